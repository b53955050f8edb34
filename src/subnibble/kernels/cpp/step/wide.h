// 16 numbers at a time, in vectors of the instruction set that a source file is compiled for. Sums of products may be
// fused: unlike those of linears, results of these sources are not compared bit for bit.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include "numbers.h"

namespace {

namespace wide {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kWide = 16, kParts = kWide / kLanes;

#define SUBNIBBLE_INLINE inline __attribute__((always_inline))

typedef float FloatPart __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IntPart __attribute__((vector_size(4 * kLanes)));

struct I {
    IntPart part[kParts];
};

struct F {
    FloatPart part[kParts];
};

SUBNIBBLE_INLINE F broadcast(float value) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = value - FloatPart{};
    return out;
}

SUBNIBBLE_INLINE F load(const float* from) {
    F out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

SUBNIBBLE_INLINE void store(float* to, const F& a) { std::memcpy(to, &a, sizeof a); }

SUBNIBBLE_INLINE F operator+(const F& a, const F& b) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] + b.part[i];
    return out;
}

SUBNIBBLE_INLINE F operator-(const F& a, const F& b) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] - b.part[i];
    return out;
}

SUBNIBBLE_INLINE F operator*(const F& a, const F& b) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] * b.part[i];
    return out;
}

SUBNIBBLE_INLINE F operator/(const F& a, const F& b) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] / b.part[i];
    return out;
}

SUBNIBBLE_INLINE F max(const F& a, const F& b) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
    return out;
}

// `a` where it is above `limit`, else 0.
SUBNIBBLE_INLINE F above(const F& a, const F& compared, float limit) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
        const FloatPart least = limit - FloatPart{};
        out.part[i] = compared.part[i] > least ? a.part[i] : FloatPart{};
    }
    return out;
}

SUBNIBBLE_INLINE I operator+(const I& a, std::int32_t b) {
    I out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] + b;
    return out;
}

SUBNIBBLE_INLINE I operator&(const I& a, std::int32_t mask) {
    I out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] & mask;
    return out;
}

template <int COUNT>
SUBNIBBLE_INLINE I right(const I& a) {
    I out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = a.part[i] >> COUNT;
    return out;
}

SUBNIBBLE_INLINE F to_float(const I& a) {
    F out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = __builtin_convertvector(a.part[i], FloatPart);
    return out;
}

SUBNIBBLE_INLINE F load_halves(const std::uint16_t* from) {
    F out;
#if defined(__AVX512F__)
    out.part[0] = (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i)
        out.part[i] =
            (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kLanes)));
#elif defined(__ARM_NEON)
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i)
        out.part[i] = (FloatPart)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i * kLanes)));
#else
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i)
        for (int l = 0; l < kLanes; ++l) out.part[i][l] = from_half(from[i * kLanes + l]);
#endif
    return out;
}

// Bfloat16 numbers.
SUBNIBBLE_INLINE F load_bfloats(const std::uint16_t* from) {
    F out;
#if defined(__AVX512F__)
    const __m256i shorts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    out.part[0] = (FloatPart)_mm512_slli_epi32(_mm512_cvtepu16_epi32(shorts), 16);
#elif defined(__AVX2__)
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
        const __m128i shorts = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * kLanes));
        out.part[i] = (FloatPart)_mm256_slli_epi32(_mm256_cvtepu16_epi32(shorts), 16);
    }
#else
    for (int i = 0; i < kParts; ++i)
        for (int l = 0; l < kLanes; ++l) {
            const std::uint32_t bits = std::uint32_t{from[i * kLanes + l]} << 16;
            std::memcpy(reinterpret_cast<float*>(&out.part[i]) + l, &bits, 4);
        }
#endif
    return out;
}

// Sum of all numbers, or the largest: halves are added until one is left.
SUBNIBBLE_INLINE float sum(const F& a) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)a.part[0]);
#else
    FloatPart all = a.part[0];
    for (int i = 1; i < kParts; ++i) all += a.part[i];
    float out = 0;
    for (int l = 0; l < kLanes; ++l) out += all[l];
    return out;
#endif
}

SUBNIBBLE_INLINE float largest(const F& a) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)a.part[0]);
#else
    FloatPart all = a.part[0];
    for (int i = 1; i < kParts; ++i) all = all > a.part[i] ? all : a.part[i];
    float out = all[0];
    for (int l = 1; l < kLanes; ++l) out = all[l] > out ? all[l] : out;
    return out;
#endif
}

// Nearest whole numbers, of magnitudes up to 2^22.
SUBNIBBLE_INLINE I nearest(const F& a) {
    const F shifted = a + broadcast(12582912.0f);
    I out;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) out.part[i] = (IntPart)shifted.part[i] - 0x4B400000;
    return out;
}

// The low byte of each number.
SUBNIBBLE_INLINE void store_bytes(std::int8_t* to, const I& a) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)a.part[0]));
#else
    for (int i = 0; i < kParts; ++i)
        for (int l = 0; l < kLanes; ++l) to[i * kLanes + l] = static_cast<std::int8_t>(a.part[i][l]);
#endif
}

SUBNIBBLE_INLINE I load_ints(const std::uint8_t* from) {
    I out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

// e^x within 3 units in the last place; 0 below -87, x at most 88.
SUBNIBBLE_INLINE F exp(const F& x) {
    constexpr float kLeast = -87.0f;
    const F bounded = max(x, broadcast(kLeast)), shift = broadcast(12582912.0f);
    const F shifted = bounded * broadcast(1.44269504f) + shift;
    const F n = shifted - shift;
    const F r = bounded - n * broadcast(0.693359375f) - n * broadcast(-2.12194440e-4f);
    F y = broadcast(1.0f / 720);
    for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + broadcast(c);
    F scale;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; ++i) {
        // The low bits of a number that was shifted are those of n.
        const IntPart bits = (IntPart)shifted.part[i];
        scale.part[i] = (FloatPart)((bits - 0x4B400000 + 127) << 23);
    }
    return above(y * scale, x, kLeast);
}

}  // namespace wide

}  // namespace
