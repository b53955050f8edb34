// Limits of this machine: reading memory, int8 products, float32 products. Compiled for this processor by peaks.py.

#include <cstddef>
#include <cstdint>
#include <immintrin.h>
#include <omp.h>

namespace {

// Chains of dependent operations: more than the latency of an operation times the operations a cycle.
constexpr int CHAINS = 16;

#if defined(__AVX512F__)
using Floats = __m512;
using Integers = __m512i;
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
Floats ones() { return _mm512_set1_ps(1); }
Integers words() { return _mm512_set1_epi32(0x01010101); }
Integers load(const char* at) { return _mm512_loadu_si512(at); }
Integers either(Integers a, Integers b) { return _mm512_or_si512(a, b); }
#else
using Floats = __m256;
using Integers = __m256i;
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
Floats ones() { return _mm256_set1_ps(1); }
Integers words() { return _mm256_set1_epi32(0x01010101); }
Integers load(const char* at) { return _mm256_loadu_si256(reinterpret_cast<const Integers*>(at)); }
Integers either(Integers a, Integers b) { return _mm256_or_si256(a, b); }
#endif

#if defined(__AVX512VNNI__)
Integers dot(Integers sum, Integers a, Integers b) { return _mm512_dpbusd_epi32(sum, a, b); }
#elif defined(__AVXVNNI__)
Integers dot(Integers sum, Integers a, Integers b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
#elif !defined(__AVX512F__)
Integers dot(Integers sum, Integers a, Integers b) {
    auto pairs = _mm256_maddubs_epi16(a, b);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#else
Integers dot(Integers sum, Integers a, Integers b) {
    auto pairs = _mm512_maddubs_epi16(a, b);
    return _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

// Keep a vector in a register, and hide from the compiler how it was computed.
template <class Vector>
void opaque(Vector& value) {
    asm volatile("" : "+x"(value));
}

template <class Vector>
void used(const Vector& value) {
    asm volatile("" ::"m"(value) : "memory");
}

}  // namespace

extern "C" {

// Float32 operations (a product and a sum are two) of `steps` steps on each thread.
double float_operations(int64_t steps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Floats sums[CHAINS], a = ones(), b = ones();
        for (auto& sum : sums)
            sum = ones();
        for (int64_t i = 0; i < steps; ++i) {
            opaque(a);
#pragma GCC unroll 16
            for (auto& sum : sums)
                sum = fma(a, b, sum);
        }
        for (auto& sum : sums)
            used(sum);
    }
    return 2.0 * double(sizeof(Floats)) / 4 * CHAINS * double(steps) * threads;
}

// Int8 operations of `steps` steps on each thread.
double int8_operations(int64_t steps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Integers sums[CHAINS], a = words(), b = words();
        for (auto& sum : sums)
            sum = words();
        for (int64_t i = 0; i < steps; ++i) {
            opaque(a);
#pragma GCC unroll 16
            for (auto& sum : sums)
                sum = dot(sum, a, b);
        }
        for (auto& sum : sums)
            used(sum);
    }
    return 2.0 * double(sizeof(Integers)) * CHAINS * double(steps) * threads;
}

// Read `bytes` bytes once, a share on each thread.
void read_memory(const char* data, int64_t bytes, int threads) {
    constexpr int64_t WIDTH = sizeof(Integers), BLOCK = 8 * WIDTH;
    int64_t share = bytes / threads / BLOCK * BLOCK;
#pragma omp parallel num_threads(threads)
    {
        const char* first = data + share * omp_get_thread_num();
        Integers all[8] = {};
        for (int64_t i = 0; i < share; i += BLOCK) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j)
                all[j] = either(all[j], load(first + i + j * WIDTH));
        }
        for (auto& one : all)
            used(one);
    }
}
}
