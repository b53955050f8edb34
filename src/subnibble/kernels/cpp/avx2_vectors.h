// 256-bit vectors: AVX2, FMA, F16C; with AVX-VNNI, products of bytes are one instruction.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace {

struct V {
    static constexpr int lanes = 8, registers = 16;
    using F = __m256;
    using I = __m256i;
    struct Pair {
        F low, high;
    };
    // Of 8 bits, low: the zero-point. Of 4 bits: levels of codes below 8, and of the others. Else low: 8 levels.
    template <int BITS>
    using Table = Pair;

    static F zero() { return _mm256_setzero_ps(); }
    static F broadcast(float value) { return _mm256_set1_ps(value); }
    static I load_int(const std::int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const I*>(from)); }
    static void store(float* to, F a) { _mm256_storeu_ps(to, a); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F choose(const float* from, I pattern) { return permute(_mm256_loadu_ps(from), pattern); }
    static F permute(F a, I lane) { return _mm256_permutevar8x32_ps(a, lane); }
    static I permute(I a, I lane) { return _mm256_permutevar8x32_epi32(a, lane); }
    static I shift_right(I a, I count) { return _mm256_srlv_epi32(a, count); }
    template <int BITS>
    static I words(const std::uint8_t* from) {
        if constexpr (BITS == 2) {
            return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        } else if constexpr (BITS == 3) {
            // 24 bytes: the first 16, and the last 16, of which the second half of the words needs 12.
            const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            const __m128i last = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8));
            const I bytes = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1,  //
                                             4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
            return _mm256_shuffle_epi8(_mm256_set_m128i(last, first), bytes);
        } else {
            return _mm256_loadu_si256(reinterpret_cast<const I*>(from));
        }
    }
    template <int BITS>
    static Pair levels(const float* from) {
        return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
    }
    template <int BITS>
    static Pair table(Pair levels, F subtract) {
        if constexpr (BITS == 8) return {subtract, subtract};
        return {_mm256_sub_ps(levels.low, subtract), _mm256_sub_ps(levels.high, subtract)};
    }
    template <int BITS>
    static F look_up(const Pair& table, I codes) {
        if constexpr (BITS == 8)
            return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32(255))), table.low);
        const F low = _mm256_permutevar8x32_ps(table.low, codes);
        if constexpr (BITS < 4) return low;
        // Bit 3 of the code, as the sign, chooses.
        return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(table.high, codes),
                                _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    static bool from_halves(const std::uint8_t* from, std::int64_t count, float* to) {
        std::int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
        for (; i < count; ++i) {
            std::uint16_t half;
            std::memcpy(&half, from + 2 * i, 2);
            to[i] = _cvtsh_ss(half);
        }
        return true;
    }

    // ---- for products ----
    static I load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const I*>(from)); }
    static void store_bytes(void* to, I a) { _mm256_storeu_si256(static_cast<I*>(to), a); }
    static F load_floats(const float* from) { return _mm256_loadu_ps(from); }
    static void store_floats(float* to, F a) { _mm256_storeu_ps(to, a); }
    static I bytes(int value) { return _mm256_set1_epi8(static_cast<char>(value)); }
    static I broadcast_int(std::int32_t value) { return _mm256_set1_epi32(value); }
    static I broadcast_bytes(const std::int8_t* from) {
        std::int32_t four;
        std::memcpy(&four, from, 4);
        return _mm256_set1_epi32(four);
    }
    template <int COUNT>
    static I right(I a) {
        return _mm256_srli_epi32(a, COUNT);
    }
    // Of signed words.
    template <int COUNT>
    static I signed_right(I a) {
        return _mm256_srai_epi32(a, COUNT);
    }
    template <int COUNT>
    static I left(I a) {
        return _mm256_slli_epi32(a, COUNT);
    }
    static I right_by(I a, int count) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(count)); }
    static I bits_and(I a, I b) { return _mm256_and_si256(a, b); }
    // Bits of low where mask has them, of high where only all has them.
    static I merge(I high, I low, I mask, I all) {
        return _mm256_or_si256(_mm256_and_si256(low, mask), _mm256_and_si256(high, _mm256_andnot_si256(mask, all)));
    }
    static I choose_bytes(I table, I code) { return _mm256_shuffle_epi8(table, code); }
    static I e2m1_levels() {
        return _mm256_broadcastsi128_si256(
            _mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
    }
    static I widen(const std::uint8_t* from) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    }
    static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
    static I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I mul_int(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F numbers(const std::uint8_t* from, subnibble::Number type) {
        if (type == subnibble::Number::float32) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        if (type == subnibble::Number::float16) return _mm256_cvtph_ps(halves);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
    }
    // Whether a WIDE `dot` costs no more than another.
#if defined(__AVXVNNI__)
    static constexpr bool wide = true;
#else
    static constexpr bool wide = false;
#endif
    // Adds products of unsigned bytes of `level`, 127 at most unless WIDE, and signed bytes of x, four in each lane.
    template <bool WIDE>
    static I dot(I sum, I level, I x) {
#if defined(__AVXVNNI__)
        return _mm256_dpbusd_avx_epi32(sum, level, x);
#else
        const I ones = _mm256_set1_epi16(1);
        if constexpr (WIDE) {
            // Two products of 255 * 128 do not fit 16 bits; those of half bytes do.
            const I nibble = _mm256_set1_epi8(15);
            const I low = _mm256_maddubs_epi16(_mm256_and_si256(level, nibble), x);
            const I high = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(level, 4), nibble), x);
            sum = _mm256_add_epi32(sum, _mm256_slli_epi32(_mm256_madd_epi16(high, ones), 4));
            return _mm256_add_epi32(sum, _mm256_madd_epi16(low, ones));
        }
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(level, x), ones));
#endif
    }
    static void round_to_int(const float* x, float factor, std::int64_t count, std::int32_t* out) {
        const F factors = broadcast(factor);
        std::int64_t i = 0;
        for (; i + 8 <= count; i += 8)
            _mm256_storeu_si256(reinterpret_cast<I*>(out + i),
                                _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factors)));
        for (; i < count; ++i) out[i] = _mm_cvtss_si32(_mm_set_ss(x[i] * factor));
    }
};

}  // namespace
