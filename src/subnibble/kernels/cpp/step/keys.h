// Keys of a tile (kv_form.h), and their scores. Internal linkage only, see functions_of.h.
#pragma once

#include <algorithm>

#include "step/rows.h"

namespace {

namespace step {

// Codes of a channel, of 32 tokens.
template <int BITS>
SUBNIBBLE_INLINE void key_codes(const std::uint8_t* codes, std::int64_t width, std::int64_t d, F (&out)[2]) {
    if constexpr (BITS == 8) {
        out[0] = to_float(load_bytes(codes + 32 * d));
        out[1] = to_float(load_bytes(codes + 32 * d + 16));
    } else if constexpr (BITS == 4) {
        const I both = load_bytes(codes + 16 * d);
        out[0] = to_float(both & 15);
        out[1] = to_float(right<4>(both));
    } else {
        const I four = load_bytes(codes + 16 * (d / 2));
        const I both = d % 2 == 0 ? four : right<4>(four);
        I first = both & 3, second = right<2>(both) & 3;
        if constexpr (BITS == 3) {
            std::uint16_t high[2];
            std::memcpy(high, codes + 16 * ((width + 1) / 2) + 4 * d, 4);
            first = first | left<2>(spread_bits(high[0]));
            second = second | left<2>(spread_bits(high[1]));
        }
        out[0] = to_float(first);
        out[1] = to_float(second);
    }
}

// Call `take(d, keys of 32 tokens)` for each channel of a tile.
template <int BITS, typename Take>
SUBNIBBLE_INLINE void each_channel(const KeyForm& form, const std::uint8_t* tile, const float* center, Take take) {
    const auto finished = [&](std::int64_t d, F(&key)[2]) __attribute__((always_inline)) {
        if (center != nullptr)
            for (F& half : key) half = half + broadcast(center[d]);
        take(d, key);
    };
    if constexpr (BITS == subnibble::kExact) {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(tile);
        for (std::int64_t d = 0; d < form.width; ++d) {
            F key[2] = {load_halves(halves + 32 * d), load_halves(halves + 32 * d + 16)};
            take(d, key);
        }
    } else {
        const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at());
        const std::uint16_t* lows = scales + form.scales();
        if (form.axis == Axis::token) {
            const std::int64_t groups = form.groups();
            for (std::int64_t g = 0; g < groups; ++g) {
                const F scale[2] = {load_halves(scales + 32 * g), load_halves(scales + 32 * g + 16)};
                const F low[2] = {load_halves(lows + 32 * g), load_halves(lows + 32 * g + 16)};
                const std::int64_t stop = std::min(form.width, (g + 1) * form.group);
                for (std::int64_t d = g * form.group; d < stop; ++d) {
                    F code[2];
                    key_codes<BITS>(tile, form.width, d, code);
                    F key[2] = {low[0] + scale[0] * code[0], low[1] + scale[1] * code[1]};
                    finished(d, key);
                }
            }
        } else if (form.by_halves()) {
            const std::int64_t room = padded(form.width, 16);
            for (std::int64_t from = 0; from < form.width; from += 16) {
                float of_half[4][16];
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    store(of_half[h], load_halves(scales + h * room + from));
                    store(of_half[2 + h], load_halves(lows + h * room + from));
                }
                for (std::int64_t d = from; d < std::min(form.width, from + 16); ++d) {
                    F code[2], key[2];
                    key_codes<BITS>(tile, form.width, d, code);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; ++h)
                        key[h] = broadcast(of_half[2 + h][d - from]) + broadcast(of_half[h][d - from]) * code[h];
                    finished(d, key);
                }
            }
        } else {
            for (std::int64_t d = 0; d < form.width; ++d) {
                F code[2], key[2];
                key_codes<BITS>(tile, form.width, d, code);
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h)
                    key[h] = load_halves(lows + 32 * d + 16 * h) + load_halves(scales + 32 * d + 16 * h) * code[h];
                finished(d, key);
            }
        }
    }
}

template <int R>
struct Scores {
    F sum[R][2];

    SUBNIBBLE_INLINE Scores() {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = broadcast(0);
    }
    SUBNIBBLE_INLINE void take(const float* q, std::int64_t q_stride, std::int64_t d, const F (&key)[2]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F x = broadcast(q[r * q_stride + d]);
            sum[r][0] = sum[r][0] + x * key[0];
            sum[r][1] = sum[r][1] + x * key[1];
        }
    }
    SUBNIBBLE_INLINE void write(float* out, std::int64_t out_stride) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) store(out + r * out_stride + 16 * h, sum[r][h]);
    }
};

template <int BITS>
void key_scores_of(const KeyForm& form, const std::uint8_t* tile, const float* center, const float* q,
                   std::int64_t rows, std::int64_t q_stride, float* out, std::int64_t out_stride) {
    each_rows<kScoreRows>(rows, [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        Scores<decltype(count)::value> scores;
        const float* of_rows = q + first * q_stride;
        each_channel<BITS>(form, tile, center, [&](std::int64_t d, const F(&key)[2]) __attribute__((always_inline)) {
            scores.take(of_rows, q_stride, d, key);
        });
        scores.write(out + first * out_stride, out_stride);
    });
}

void key_scores(const KeyForm& form, const std::uint8_t* tile, const float* center, const float* q, std::int64_t rows,
                std::int64_t q_stride, float* out, std::int64_t out_stride) {
    auto* run = form.bits == 2   ? key_scores_of<2>
                : form.bits == 3 ? key_scores_of<3>
                : form.bits == 4 ? key_scores_of<4>
                : form.bits == 8 ? key_scores_of<8>
                                 : key_scores_of<subnibble::kExact>;
    run(form, tile, center, q, rows, q_stride, out, out_stride);
}

template <int BITS>
void keys_of(const KeyForm& form, const std::uint8_t* tile, const float* center, float* out) {
    each_channel<BITS>(form, tile, center, [&](std::int64_t d, const F(&key)[2]) __attribute__((always_inline)) {
        store(out + 32 * d, key[0]);
        store(out + 32 * d + 16, key[1]);
    });
}

void keys(const KeyForm& form, const std::uint8_t* tile, const float* center, float* out) {
    auto* run = form.bits == 2   ? keys_of<2>
                : form.bits == 3 ? keys_of<3>
                : form.bits == 4 ? keys_of<4>
                : form.bits == 8 ? keys_of<8>
                                 : keys_of<subnibble::kExact>;
    run(form, tile, center, out);
}

void scores(const float* dense_keys, std::int64_t width, const float* q, std::int64_t rows, std::int64_t q_stride,
            float* out, std::int64_t out_stride) {
    each_rows<kScoreRows>(rows, [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        Scores<decltype(count)::value> all;
        for (std::int64_t d = 0; d < width; ++d) {
            const F key[2] = {load(dense_keys + 32 * d), load(dense_keys + 32 * d + 16)};
            all.take(q + first * q_stride, q_stride, d, key);
        }
        all.write(out + first * out_stride, out_stride);
    });
}

}  // namespace step

}  // namespace
