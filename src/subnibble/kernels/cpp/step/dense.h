// Products with dense matrices. Internal linkage only, see functions_of.h.
#pragma once

#include <algorithm>

#include "step/rows.h"

namespace {

namespace step {

template <Number TYPE>
SUBNIBBLE_INLINE F numbers(const void* from, std::int64_t index) {
    if constexpr (TYPE == Number::float32) return load(static_cast<const float*>(from) + index);
    if constexpr (TYPE == Number::bfloat16) return load_bfloats(static_cast<const std::uint16_t*>(from) + index);
    return load_halves(static_cast<const std::uint16_t*>(from) + index);
}

template <Number TYPE, int T>
void dense_rows(const void* rows, std::int64_t columns, const float* x, std::int64_t x_stride, std::int64_t first,
                std::int64_t last, float* y, std::int64_t y_stride) {
    constexpr int R = 2;
    for (std::int64_t r = first; r < last; r += R) {
        const int here = static_cast<int>(std::min<std::int64_t>(R, last - r));
        F total[R][T];
        for (auto& row : total)
            for (F& one : row) one = broadcast(0);
        std::int64_t i = 0;
        for (; i + kWide <= columns; i += kWide) {
            F w[R];
#pragma GCC unroll 8
            for (int k = 0; k < R; ++k) w[k] = numbers<TYPE>(rows, (r + (k < here ? k : 0)) * columns + i);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const F of_x = load(x + t * x_stride + i);
#pragma GCC unroll 8
                for (int k = 0; k < R; ++k) total[k][t] = total[k][t] + w[k] * of_x;
            }
        }
        for (int k = 0; k < here; ++k)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                float all = sum(total[k][t]);
                for (std::int64_t j = i; j < columns; ++j)
                    all += number(static_cast<const std::uint8_t*>(rows), TYPE, (r + k) * columns + j) * x[t * x_stride + j];
                y[t * y_stride + r + k] = all;
            }
    }
}

template <Number TYPE>
void dense_of(const void* rows, std::int64_t columns, const float* x, std::int64_t x_stride, std::int64_t tokens,
              std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride) {
    // Rows that stay in the cache while all tokens pass.
    constexpr std::int64_t kRows = 32;
    for (std::int64_t from = first; from < last; from += kRows) {
        const std::int64_t to = std::min(last, from + kRows);
        std::int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            dense_rows<TYPE, 4>(rows, columns, x + t * x_stride, x_stride, from, to, y + t * y_stride, y_stride);
        for (; t < tokens; ++t)
            dense_rows<TYPE, 1>(rows, columns, x + t * x_stride, x_stride, from, to, y + t * y_stride, y_stride);
    }
}

void dense(const void* rows, Number type, std::int64_t columns, const float* x, std::int64_t x_stride,
           std::int64_t tokens, std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride) {
    auto* run = type == Number::float32    ? dense_of<Number::float32>
                : type == Number::bfloat16 ? dense_of<Number::bfloat16>
                                          : dense_of<Number::float16>;
    run(rows, columns, x, x_stride, tokens, first, last, y, y_stride);
}

}  // namespace step

}  // namespace
