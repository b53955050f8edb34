// 512-bit vectors: AVX-512 F, BW, VL, DQ; with VNNI, products of bytes are one instruction.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace {

struct V {
    static constexpr int lanes = 16, registers = 32;
    using F = __m512;
    using I = __m512i;
    // Of 8 bits: the zero-point. Else: 16 levels.
    template <int BITS>
    using Table = __m512;

    static F zero() { return _mm512_setzero_ps(); }
    static F broadcast(float value) { return _mm512_set1_ps(value); }
    static I load_int(const std::int32_t* from) { return _mm512_loadu_si512(from); }
    static void store(float* to, F a) { _mm512_storeu_ps(to, a); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F choose(const float* from, I pattern) { return _mm512_permutexvar_ps(pattern, _mm512_loadu_ps(from)); }
    static F permute(F a, I lane) { return _mm512_permutexvar_ps(lane, a); }
    static I permute(I a, I lane) { return _mm512_permutexvar_epi32(lane, a); }
    static I shift_right(I a, I count) { return _mm512_srlv_epi32(a, count); }
    template <int BITS>
    static I words(const std::uint8_t* from) {
        if constexpr (BITS == 2) {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        } else if constexpr (BITS == 3) {
            // 12 bytes to each 128-bit lane, then 3 of them to each word.
            const I packed = _mm512_maskz_loadu_epi32(0x0FFF, from);
            const I lane = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
            const I bytes = _mm512_broadcast_i32x4(
                _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1));
            return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lane, packed), bytes);
        } else {
            return _mm512_loadu_si512(from);
        }
    }
    template <int BITS>
    static F levels(const float* from) {
        return _mm512_loadu_ps(from);
    }
    template <int BITS>
    static F table(F levels, F subtract) {
        return BITS == 8 ? subtract : _mm512_sub_ps(levels, subtract);
    }
    template <int BITS>
    static F look_up(F table, I codes) {
        if constexpr (BITS == 8)
            return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(255))), table);
        else
            return _mm512_permutexvar_ps(codes, table);
    }
    static bool from_halves(const std::uint8_t* from, std::int64_t count, float* to) {
        std::int64_t i = 0;
        for (; i + 16 <= count; i += 16)
            _mm512_storeu_ps(to + i,
                             _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * i))));
        const __mmask16 rest = static_cast<__mmask16>((1u << (count - i)) - 1);
        const __m256i halves = _mm256_maskz_loadu_epi16(rest, from + 2 * i);
        _mm512_mask_storeu_ps(to + i, rest, _mm512_cvtph_ps(halves));
        return true;
    }

    // ---- for products ----
    static I load_bytes(const void* from) { return _mm512_loadu_si512(from); }
    static void store_bytes(void* to, I a) { _mm512_storeu_si512(to, a); }
    static F load_floats(const float* from) { return _mm512_loadu_ps(from); }
    static void store_floats(float* to, F a) { _mm512_storeu_ps(to, a); }
    static I bytes(int value) { return _mm512_set1_epi8(static_cast<char>(value)); }
    static I broadcast_int(std::int32_t value) { return _mm512_set1_epi32(value); }
    static I broadcast_bytes(const std::int8_t* from) {
        std::int32_t four;
        std::memcpy(&four, from, 4);
        return _mm512_set1_epi32(four);
    }
    template <int COUNT>
    static I right(I a) {
        return _mm512_srli_epi32(a, COUNT);
    }
    // Of signed words.
    template <int COUNT>
    static I signed_right(I a) {
        return _mm512_srai_epi32(a, COUNT);
    }
    template <int COUNT>
    static I left(I a) {
        return _mm512_slli_epi32(a, COUNT);
    }
    static I right_by(I a, int count) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(count)); }
    static I bits_and(I a, I b) { return _mm512_and_si512(a, b); }
    // Bits of low where mask has them, of high where only all has them.
    static I merge(I high, I low, I mask, I all) {
        return _mm512_and_si512(_mm512_ternarylogic_epi32(mask, low, high, 0xCA), all);
    }
    static I choose_bytes(I table, I code) { return _mm512_shuffle_epi8(table, code); }
    static I e2m1_levels() {
        return _mm512_broadcast_i32x4(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    }
    static I widen(const std::uint8_t* from) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F numbers(const std::uint8_t* from, subnibble::Number type) {
        if (type == subnibble::Number::float32) return _mm512_loadu_ps(from);
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        if (type == subnibble::Number::float16) return _mm512_cvtph_ps(halves);
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    // Whether a WIDE `dot` costs no more than another.
#if defined(__AVX512VNNI__)
    static constexpr bool wide = true;
#else
    static constexpr bool wide = false;
#endif
    // Adds products of unsigned bytes of `level`, 127 at most unless WIDE, and signed bytes of x, four in each lane.
    template <bool WIDE>
    static I dot(I sum, I level, I x) {
#if defined(__AVX512VNNI__)
        // The intrinsic makes GCC 12 copy each sum twice.
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(level), "v"(x));
        return sum;
#else
        const I ones = _mm512_set1_epi16(1);
        if constexpr (WIDE) {
            // Two products of 255 * 128 do not fit 16 bits; those of half bytes do.
            const I nibble = _mm512_set1_epi8(15);
            const I low = _mm512_maddubs_epi16(_mm512_and_si512(level, nibble), x);
            const I high = _mm512_maddubs_epi16(_mm512_and_si512(_mm512_srli_epi16(level, 4), nibble), x);
            sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_madd_epi16(high, ones), 4));
            return _mm512_add_epi32(sum, _mm512_madd_epi16(low, ones));
        }
        return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(level, x), ones));
#endif
    }
    static void round_to_int(const float* x, float factor, std::int64_t count, std::int32_t* out) {
        const F factors = broadcast(factor);
        std::int64_t i = 0;
        for (; i + 16 <= count; i += 16)
            _mm512_storeu_si512(out + i, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), factors)));
        for (; i < count; ++i) out[i] = _mm_cvtss_si32(_mm_set_ss(x[i] * factor));
    }
};

}  // namespace
