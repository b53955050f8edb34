// AVX2, FMA, F16C.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct V {
    static constexpr int lanes = 8, rows = 1;
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
    static F load(const float* from) { return _mm256_loadu_ps(from); }
    static I load_int(const std::int32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const I*>(from)); }
    static void store(float* to, F a) { _mm256_storeu_ps(to, a); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static float reduce(F a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static F choose(const float* from, I pattern) { return permute(_mm256_loadu_ps(from), pattern); }
    static F permute(F a, I lane) { return _mm256_permutevar8x32_ps(a, lane); }
    static I permute(I a, I lane) { return _mm256_permutevar8x32_epi32(a, lane); }
    static I shift_right(I a, I count) { return _mm256_srlv_epi32(a, count); }
    template <int BITS>
    static I next(I a) {
        return _mm256_srli_epi32(a, BITS);
    }
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
};

}  // namespace

#include "rows.h"

namespace subnibble {
const Kernel avx2{"avx2", L, multiply, dequantize};
}
