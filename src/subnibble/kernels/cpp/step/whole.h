// Products of the codes of a strip (kv_form.h) and of float32 numbers that are rounded to whole ones of 16 bits.
// Internal linkage only, see functions_of.h.
#pragma once

#if defined(__AVX512F__)
#include "avx512_vectors.h"
#elif defined(__AVX2__)
#include "avx2_vectors.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "neon_vectors.h"
#else
#include "portable_vectors.h"
#endif
#include "step/rows.h"

namespace {

namespace step {

using subnibble::kStripVector;
using subnibble::StripForm;

// Vectors of a quad, and rows whose sums fit the registers.
constexpr int kQuadVectors = static_cast<int>(subnibble::kStripLanes) / V::lanes, kWholeRows = V::lanes == 16 ? 8 : 4;

// `V::dot` with the same four bytes in each lane, read from memory.
template <bool WIDE>
SUBNIBBLE_INLINE V::I dot_four(V::I sum, V::I codes, const std::int8_t* x) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const std::int32_t*>(x)));
    return sum;
#else
    return V::template dot<WIDE>(sum, codes, V::broadcast_bytes(x));
#endif
}

// Numbers of R rows as two signed bytes each: x is about step * (256 high + low).
template <int R>
struct Whole {
    static constexpr std::int64_t kRoom = 512;
    alignas(64) std::int8_t bytes[R][2][kRoom];

    // Round numbers of row r, from number `first` on; returns the step. The largest magnitude becomes 127 * 256.
    SUBNIBBLE_INLINE float round(int r, std::int64_t first, const F* x, std::int64_t vectors) {
        F most = broadcast(0);
        for (std::int64_t i = 0; i < vectors; ++i) most = max(most, max(x[i], broadcast(0) - x[i]));
        const float highest = largest(most);
        const F factor = broadcast(highest > 0 ? 32512.0f / highest : 0.0f);
        for (std::int64_t i = 0; i < vectors; ++i) {
            const I number = nearest(x[i] * factor);
            store_bytes(bytes[r][0] + first + 16 * i, right<8>(number + 128));
            store_bytes(bytes[r][1] + first + 16 * i, number);
        }
        return highest * (1.0f / 32512.0f);
    }
};

// Codes of the four quads from 4 `block` on, lanes of vector `part`.
template <int BITS>
SUBNIBBLE_INLINE void four_quads(const std::uint8_t* strip, const StripForm& form, std::int64_t block, int part,
                                 V::I (&out)[4]) {
    const auto vector = [&](std::int64_t index) __attribute__((always_inline)) {
        return V::load_bytes(strip + kStripVector * index + 4 * V::lanes * part);
    };
    if constexpr (BITS == 8) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) out[i] = vector(4 * block + i);
    } else if constexpr (BITS == 4) {
        const V::I mask = V::bytes(15);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const V::I two = vector(2 * block + i);
            out[2 * i] = V::bits_and(two, mask);
            out[2 * i + 1] = V::bits_and(V::template right<4>(two), mask);
        }
    } else {
        const V::I mask = V::bytes(3), four = vector(block);
        out[0] = V::bits_and(four, mask);
        out[1] = V::bits_and(V::template right<2>(four), mask);
        out[2] = V::bits_and(V::template right<4>(four), mask);
        out[3] = V::bits_and(V::template right<6>(four), mask);
        if constexpr (BITS == 3) {
            const V::I bit = V::bytes(4);
            const V::I high = V::right_by(vector(form.quads / 4 + block / 2), static_cast<int>(4 * (block % 2)));
            out[0] = V::add_int(out[0], V::bits_and(V::template left<2>(high), bit));
            out[1] = V::add_int(out[1], V::bits_and(V::template left<1>(high), bit));
            out[2] = V::add_int(out[2], V::bits_and(high, bit));
            out[3] = V::add_int(out[3], V::bits_and(V::template right<1>(high), bit));
        }
    }
}

// Products of codes and of R rows of whole numbers, summed over 4 * blocks quads, for the lanes of vector `part`. The
// quads' whole numbers begin with number `first`.
template <int BITS, int R>
SUBNIBBLE_INLINE void whole_sums(const std::uint8_t* strip, const StripForm& form, std::int64_t first_block,
                                 std::int64_t blocks, int part, const Whole<R>& x, std::int64_t first, V::F (&out)[R]) {
    V::I high[R], low[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) high[r] = low[r] = V::broadcast_int(0);
    const std::int8_t* at = x.bytes[0][0] + first;
    for (std::int64_t b = 0; b < blocks; ++b, at += 16) {
        V::I codes[4];
        four_quads<BITS>(strip, form, first_block + b, part, codes);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const std::int8_t* four = at + 2 * Whole<R>::kRoom * r + 4 * i;
                high[r] = dot_four<BITS == 8>(high[r], codes[i], four);
                low[r] = dot_four<BITS == 8>(low[r], codes[i], four + Whole<R>::kRoom);
            }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) out[r] = V::to_float(V::add_int(V::template left<8>(high[r]), low[r]));
}

// Call `take(index of a number, its codes as floats, 16 lanes)` for each number along a strip.
template <int BITS, typename Take>
SUBNIBBLE_INLINE void each_number(const std::uint8_t* strip, const StripForm& form, Take take) {
    for (std::int64_t block = 0; block < form.quads / 4; ++block) {
        alignas(64) std::uint8_t bytes[4][kStripVector];
        for (int part = 0; part < kQuadVectors; ++part) {
            V::I codes[4];
            four_quads<BITS>(strip, form, block, part, codes);
            for (int i = 0; i < 4; ++i) V::store_bytes(bytes[i] + 4 * V::lanes * part, codes[i]);
        }
        for (int i = 0; i < 4; ++i) {
            const I four = load_ints(bytes[i]);
            take(16 * block + 4 * i, to_float(four & 255));
            take(16 * block + 4 * i + 1, to_float(right<8>(four) & 255));
            take(16 * block + 4 * i + 2, to_float(right<16>(four) & 255));
            take(16 * block + 4 * i + 3, to_float(right<24>(four) & 255));
        }
    }
}

}  // namespace step

}  // namespace
