// AVX-512 F, BW, VL.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct V {
    static constexpr int lanes = 16, rows = 2;
    using F = __m512;
    using I = __m512i;
    // Of 8 bits: the zero-point. Else: 16 levels.
    template <int BITS>
    using Table = __m512;

    static F zero() { return _mm512_setzero_ps(); }
    static F broadcast(float value) { return _mm512_set1_ps(value); }
    static F load(const float* from) { return _mm512_loadu_ps(from); }
    static I load_int(const std::int32_t* from) { return _mm512_loadu_si512(from); }
    static void store(float* to, F a) { _mm512_storeu_ps(to, a); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static float reduce(F a) { return _mm512_reduce_add_ps(a); }
    static F choose(const float* from, I pattern) { return _mm512_permutexvar_ps(pattern, _mm512_loadu_ps(from)); }
    static F permute(F a, I lane) { return _mm512_permutexvar_ps(lane, a); }
    static I permute(I a, I lane) { return _mm512_permutexvar_epi32(lane, a); }
    static I shift_right(I a, I count) { return _mm512_srlv_epi32(a, count); }
    template <int BITS>
    static I next(I a) {
        return _mm512_srli_epi32(a, BITS);
    }
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
};

}  // namespace

#include "rows.h"

namespace subnibble {
const Kernel avx512{"avx512", L, multiply, dequantize};
}
