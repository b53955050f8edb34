// Outputs of some tokens and tiles, kept in registers. Included by products.h.
#pragma once

#include <cstring>

#include "decode.h"

namespace {

namespace products {

inline void load_rows(const float* y, std::int64_t rows, F* out) {
    alignas(64) float values[kTileRows] = {};
    std::memcpy(values, y, static_cast<std::size_t>(rows < kTileRows ? rows : kTileRows) * 4);
    for (int half = 0; half < kHalves; ++half) out[half] = V::load_floats(values + half * V::lanes);
}

inline void store_rows(float* y, std::int64_t rows, const F* values) {
    if (rows >= kTileRows) {
        for (int half = 0; half < kHalves; ++half) V::store_floats(y + half * V::lanes, values[half]);
        return;
    }
    alignas(64) float all[kTileRows];
    for (int half = 0; half < kHalves; ++half) V::store_floats(all + half * V::lanes, values[half]);
    std::memcpy(y, all, static_cast<std::size_t>(rows) * 4);
}

// Apply `function(m, n)` to all, unrolled: what it indexes stays in registers.
template <int M, int N, typename Function>
inline __attribute__((always_inline)) void all(Function function) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) function(m, n);
}

template <int T, int M>
inline void load_totals(const Tiles& w, std::int64_t tile, const float* y, std::int64_t y_stride, bool add,
                        F (&total)[M][T * kHalves]) {
    for (int m = 0; m < M; ++m)
        for (int t = 0; t < T; ++t)
            if (add)
                load_rows(y + m * y_stride + t * kTileRows, w.rows - (tile + t) * kTileRows, total[m] + t * kHalves);
            else
                for (int half = 0; half < kHalves; ++half) total[m][t * kHalves + half] = V::broadcast(0.0f);
}

template <int T, int M>
inline void store_totals(const Tiles& w, std::int64_t tile, float* y, std::int64_t y_stride,
                         const F (&total)[M][T * kHalves]) {
    for (int m = 0; m < M; ++m)
        for (int t = 0; t < T; ++t)
            store_rows(y + m * y_stride + t * kTileRows, w.rows - (tile + t) * kTileRows, total[m] + t * kHalves);
}

}  // namespace products

}  // namespace
