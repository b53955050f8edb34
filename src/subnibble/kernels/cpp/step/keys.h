// Keys of tiles (kv_form.h), and their scores. Internal linkage only, see functions_of.h.
#pragma once

#include <algorithm>

#include "step/whole.h"

namespace {

namespace step {

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

SUBNIBBLE_INLINE float dot_floats(const float* x, const float* y, std::int64_t count) {
    F total = broadcast(0);
    std::int64_t i = 0;
    for (; i + 16 <= count; i += 16) total = total + load(x + i) * load(y + i);
    float out = sum(total);
    for (; i < count; ++i) out += x[i] * y[i];
    return out;
}

// Scores of R rows where a group is channels of a token: of each group, scale * (q . codes) + low * (sum of q).
template <int BITS, int R>
void scores_by_token(const KeyForm& form, const std::uint8_t* tile, std::int64_t tiles, const float* center,
                     const float* q, std::int64_t q_stride, float* out, std::int64_t out_stride, Next next) {
    constexpr std::int64_t kGroups = 16;
    Whole<R> whole;
    float step[R][kGroups], total[R][kGroups], shift[R];
    const std::int64_t groups = form.groups();
    for (int r = 0; r < R; ++r) {
        const float* row = q + r * q_stride;
        shift[r] = center == nullptr ? 0.0f : dot_floats(row, center, form.width);
        for (std::int64_t g = 0; g < groups; ++g) {
            const std::int64_t first = g * form.group, vectors = (std::min(form.group, form.room() - first) + 15) / 16;
            F x[16], all = broadcast(0);
            for (std::int64_t i = 0; i < vectors; ++i) x[i] = load(row + first + 16 * i), all = all + x[i];
            step[r][g] = whole.round(r, first, x, vectors);
            total[r][g] = sum(all);
        }
    }
    const StripForm strip = form.strip();
    const std::int64_t strip_bytes = strip.nbytes();
    for (std::int64_t t = 0; t < tiles; ++t, tile += form.tile_bytes(), out += kTokens) {
        next.fetch(tiles, t, tiles);
        const std::uint8_t* scales = tile + form.scales_at();
        const std::uint8_t* lows = scales + 2 * form.scales();
#pragma GCC unroll 1
        for (std::int64_t lane = 0; lane < kTokens; lane += V::lanes) {
            const std::uint8_t* of_half = tile + lane / 16 * strip_bytes;
            const int part = static_cast<int>(lane % 16) / V::lanes;
            V::F scores[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) scores[r] = V::broadcast(shift[r]);
            for (std::int64_t g = 0; g < groups; ++g) {
                const std::int64_t first = g * form.group;
                const std::int64_t blocks = (std::min(form.group, form.room() - first) + 15) / 16;
                V::F sums[R];
                whole_sums<BITS, R>(of_half, strip, first / 16, blocks, part, whole, first, sums);
                const std::int64_t at = 2 * (kTokens * g + lane);
                const V::F scale = V::numbers(scales + at, Number::float16);
                const V::F low = V::numbers(lows + at, Number::float16);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    scores[r] = V::add(scores[r], V::mul(V::mul(sums[r], V::broadcast(step[r][g])), scale));
                    scores[r] = V::add(scores[r], V::mul(low, V::broadcast(total[r][g])));
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) V::store_floats(out + r * out_stride + lane, scores[r]);
        }
    }
}

// Scores of R rows where a group is tokens of a channel: (q * scale) . codes + q . low.
template <int BITS, int R>
void scores_by_channel(const KeyForm& form, const std::uint8_t* tile, std::int64_t tiles, const float* center,
                       const float* q, std::int64_t q_stride, float* out, std::int64_t out_stride, Next next) {
    Whole<R> whole;
    float step[R], shift[R], of_center[R];
    for (int r = 0; r < R; ++r)
        of_center[r] = center == nullptr ? 0.0f : dot_floats(q + r * q_stride, center, form.width);
    const StripForm strip = form.strip();
    const std::int64_t strip_bytes = strip.nbytes(), room = form.room();
    for (std::int64_t t = 0; t < tiles; ++t, tile += form.tile_bytes(), out += kTokens) {
        next.fetch(tiles, t, tiles);
        for (std::int64_t half = 0; half < 2; ++half) {
            const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at()) + half * room;
            const std::uint16_t* lows = scales + form.scales();
            // Groups of 32 tokens and more hold both halves.
            if (half == 0 || form.group % kTokens != 0)
                for (int r = 0; r < R; ++r) {
                    F x[16], all = broadcast(0);
                    for (std::int64_t i = 0; i < room / 16; ++i) {
                        const F row = load(q + r * q_stride + 16 * i);
                        x[i] = row * load_halves(scales + 16 * i);
                        all = all + row * load_halves(lows + 16 * i);
                    }
                    step[r] = whole.round(r, 0, x, room / 16);
                    shift[r] = of_center[r] + sum(all);
                }
#pragma GCC unroll 1
            for (int part = 0; part < kQuadVectors; ++part) {
                V::F sums[R];
                whole_sums<BITS, R>(tile + half * strip_bytes, strip, 0, room / 16, part, whole, 0, sums);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r)
                    V::store_floats(out + r * out_stride + 16 * half + V::lanes * part,
                                    V::add(V::mul(sums[r], V::broadcast(step[r])), V::broadcast(shift[r])));
            }
        }
    }
}

template <int BITS>
void coded_scores(const KeyForm& form, const std::uint8_t* tile, std::int64_t tiles, const float* center,
                  const float* q, std::int64_t rows, std::int64_t q_stride, float* out, std::int64_t out_stride, Next next) {
    each_rows<kWholeRows>(rows, [&](auto count, std::int64_t row) {
        constexpr int R = decltype(count)::value;
        const auto run = form.axis == Axis::token ? scores_by_token<BITS, R> : scores_by_channel<BITS, R>;
        run(form, tile, tiles, center, q + row * q_stride, q_stride, out + row * out_stride, out_stride,
            row == 0 ? next : Next{});
    });
}

void exact_scores(const KeyForm& form, const std::uint8_t* tile, std::int64_t tiles, const float*, const float* q,
                  std::int64_t rows, std::int64_t q_stride, float* out, std::int64_t out_stride, Next) {
    for (std::int64_t t = 0; t < tiles; ++t, tile += form.tile_bytes(), out += kTokens)
        each_rows<kScoreRows>(rows, [&](auto count, std::int64_t row) __attribute__((always_inline)) {
            const auto* halves = reinterpret_cast<const std::uint16_t*>(tile);
            Scores<decltype(count)::value> scores;
            for (std::int64_t d = 0; d < form.width; ++d) {
                const F key[2] = {load_halves(halves + 32 * d), load_halves(halves + 32 * d + 16)};
                scores.take(q + row * q_stride, q_stride, d, key);
            }
            scores.write(out + row * out_stride, out_stride);
        });
}

void key_scores(const KeyForm& form, const std::uint8_t* tile, std::int64_t tiles, const float* center, const float* q,
                std::int64_t rows, std::int64_t q_stride, float* out, std::int64_t out_stride, Next next) {
    auto* run = form.bits == 2   ? coded_scores<2>
                : form.bits == 3 ? coded_scores<3>
                : form.bits == 4 ? coded_scores<4>
                : form.bits == 8 ? coded_scores<8>
                                 : exact_scores;
    run(form, tile, tiles, center, q, rows, q_stride, out, out_stride, next);
}

template <int BITS>
void coded_keys(const KeyForm& form, const std::uint8_t* tile, const float* center, float* out) {
    const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at());
    const std::uint16_t* lows = scales + form.scales();
    const StripForm strip = form.strip();
    for (std::int64_t half = 0; half < 2; ++half)
        each_number<BITS>(tile + half * strip.nbytes(), strip, [&](std::int64_t d, const F& codes) {
            if (d >= form.width) return;
            const std::int64_t at = form.scale_of(16 * half, d);
            const bool shared = form.axis == Axis::channel && form.by_halves();
            const F scale = shared ? broadcast(from_half(scales[at])) : load_halves(scales + at);
            const F low = shared ? broadcast(from_half(lows[at])) : load_halves(lows + at);
            const F key = low + scale * codes;
            store(out + kTokens * d + 16 * half, center == nullptr ? key : key + broadcast(center[d]));
        });
}

void exact_keys(const KeyForm& form, const std::uint8_t* tile, const float*, float* out) {
    for (std::int64_t i = 0; i < kTokens * form.width; i += 16)
        store(out + i, load_halves(reinterpret_cast<const std::uint16_t*>(tile) + i));
}

void keys(const KeyForm& form, const std::uint8_t* tile, const float* center, float* out) {
    auto* run = form.bits == 2   ? coded_keys<2>
                : form.bits == 3 ? coded_keys<3>
                : form.bits == 4 ? coded_keys<4>
                : form.bits == 8 ? coded_keys<8>
                                 : exact_keys;
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
