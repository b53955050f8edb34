// Values of tiles (kv_form.h), and their weighted sums. Internal linkage only, see functions_of.h.
#pragma once

#include <algorithm>
#include <utility>

#include "step/whole.h"

namespace {

namespace step {

// Sums over tokens of COUNT vectors for R rows; out: their first numbers. vector(j, n): vector n of token j.
template <int R, int COUNT, typename Vector>
SUBNIBBLE_INLINE void weigh_vectors(Vector vector, std::int64_t tokens, const float* p, std::int64_t p_stride,
                                    float* out, std::int64_t out_stride) {
    F total[R][COUNT];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < COUNT; ++n) total[r][n] = load(out + r * out_stride + 16 * n);
    for (std::int64_t j = 0; j < tokens; ++j) {
        F v[COUNT];
#pragma GCC unroll 4
        for (int n = 0; n < COUNT; ++n) v[n] = vector(j, n);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F weight = broadcast(p[r * p_stride + j]);
#pragma GCC unroll 4
            for (int n = 0; n < COUNT; ++n) total[r][n] = total[r][n] + weight * v[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < COUNT; ++n) store(out + r * out_stride + 16 * n, total[r][n]);
}

// Call `run(vectors as a constant, first vector)`, four at a time.
template <typename Run>
SUBNIBBLE_INLINE void each_four(std::int64_t vectors, Run run) {
    std::int64_t first = 0;
    for (; first + 4 <= vectors; first += 4) run(std::integral_constant<int, 4>{}, first);
    switch (vectors - first) {
        case 3: run(std::integral_constant<int, 3>{}, first); break;
        case 2: run(std::integral_constant<int, 2>{}, first); break;
        case 1: run(std::integral_constant<int, 1>{}, first); break;
        default: break;
    }
}

// Values in float32, or in float16: number d of token j at j * room + d.
template <typename Load, typename Values>
SUBNIBBLE_INLINE void weigh_rows(Load load_vector, const Values* values, std::int64_t room, std::int64_t tokens,
                                 const float* p, std::int64_t rows, std::int64_t p_stride, float* out,
                                 std::int64_t out_stride) {
    each_four(room / 16, [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        const auto vector = [&](std::int64_t j, int n) __attribute__((always_inline)) {
            return load_vector(values + j * room + 16 * (first + n));
        };
        each_rows<kWeighRows>(rows, [&](auto some, std::int64_t row) __attribute__((always_inline)) {
            weigh_vectors<decltype(some)::value, decltype(count)::value>(
                vector, tokens, p + row * p_stride, p_stride, out + row * out_stride + 16 * first, out_stride);
        });
    });
}

void weigh_floats(const float* dense_values, std::int64_t width, std::int64_t tokens, const float* p,
                  std::int64_t rows, std::int64_t p_stride, float* out, std::int64_t out_stride) {
    weigh_rows([](const float* from) __attribute__((always_inline)) { return load(from); }, dense_values,
               padded(width, 16), tokens, p, rows, p_stride, out, out_stride);
}

void weigh_exact(const ValueForm& form, const std::uint8_t* tile, std::int64_t tokens, const float* p,
                 std::int64_t rows, std::int64_t p_stride, float* out, std::int64_t out_stride, Next) {
    for (; tokens > 0; tokens -= kTokens, tile += form.tile_bytes(), p += kTokens)
        weigh_rows([](const std::uint16_t* from) __attribute__((always_inline)) { return load_halves(from); },
                   reinterpret_cast<const std::uint16_t*>(tile), form.room(), std::min(tokens, kTokens), p, rows,
                   p_stride, out, out_stride);
}

// For R rows, of each group: (p * scale) . codes + p . low. Weights of a tile are rounded together, those of all tiles
// first, so that one does not wait for another. At most kRunTiles tiles.
template <int BITS, int R>
void weigh_whole(const ValueForm& form, const std::uint8_t* tile, std::int64_t tiles, const float* p,
                 std::int64_t p_stride, float* out, std::int64_t out_stride, Next next) {
    constexpr std::int64_t kGroups = 16;
    Whole<R> whole[subnibble::kRunTiles];
    float step[subnibble::kRunTiles][kGroups][R], shift[kGroups][R];
    const StripForm strip = form.strip();
    const std::int64_t strip_bytes = strip.nbytes(), groups = form.groups(), vectors = form.room() / 16;
    for (std::int64_t g = 0; g < groups; ++g) {
        F total[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[r] = broadcast(0);
        for (std::int64_t t = 0; t < tiles; ++t) {
            const std::uint8_t* scales_at = tile + t * form.tile_bytes() + form.scales_at();
            const auto* scales = reinterpret_cast<const std::uint16_t*>(scales_at) + kTokens * g;
            const std::uint16_t* lows = scales + form.scales();
            const F scale[2] = {load_halves(scales), load_halves(scales + 16)};
            const F low[2] = {load_halves(lows), load_halves(lows + 16)};
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const float* row = p + r * p_stride + kTokens * t;
                const F weight[2] = {load(row), load(row + 16)};
                const F x[2] = {weight[0] * scale[0], weight[1] * scale[1]};
                step[t][g][r] = whole[t].round(r, kTokens * g, x, 2);
                total[r] = total[r] + weight[0] * low[0];
                total[r] = total[r] + weight[1] * low[1];
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) shift[g][r] = sum(total[r]);
    }
    const std::int64_t group_vectors = groups == 1 ? vectors : form.group / 16;
    for (std::int64_t t = 0; t < tiles; ++t) {
        next.fetch(tiles, t, tiles);
        const std::uint8_t* codes = tile + t * form.tile_bytes();
        for (std::int64_t v = 0; v < vectors; ++v) {
            const std::int64_t g = v / group_vectors;
#pragma GCC unroll 1
            for (int part = 0; part < kQuadVectors; ++part) {
                V::F sums[R];
                whole_sums<BITS, R>(codes + v * strip_bytes, strip, 0, kTokens / 16, part, whole[t], kTokens * g, sums);
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    float* to = out + r * out_stride + 16 * v + V::lanes * part;
                    const V::F before = t == 0 ? V::add(V::load_floats(to), V::broadcast(shift[g][r])) : V::load_floats(to);
                    V::store_floats(to, V::add(before, V::mul(sums[r], V::broadcast(step[t][g][r]))));
                }
            }
        }
    }
}

template <int BITS>
void weigh_coded(const ValueForm& form, const std::uint8_t* tile, std::int64_t tokens, const float* p,
                 std::int64_t rows, std::int64_t p_stride, float* out, std::int64_t out_stride, Next next) {
    each_rows<kWholeRows>(rows, [&](auto count, std::int64_t row) {
        weigh_whole<BITS, decltype(count)::value>(form, tile, (tokens + kTokens - 1) / kTokens, p + row * p_stride,
                                                  p_stride, out + row * out_stride, out_stride, row == 0 ? next : Next{});
    });
}

void weigh(const ValueForm& form, const std::uint8_t* tile, std::int64_t tokens, const float* p, std::int64_t rows,
           std::int64_t p_stride, float* out, std::int64_t out_stride, Next next) {
    auto* run = form.bits == 2   ? weigh_coded<2>
                : form.bits == 3 ? weigh_coded<3>
                : form.bits == 4 ? weigh_coded<4>
                : form.bits == 8 ? weigh_coded<8>
                                 : weigh_exact;
    run(form, tile, tokens, p, rows, p_stride, out, out_stride, next);
}

template <int BITS>
void coded_values(const ValueForm& form, const std::uint8_t* tile, float* out) {
    const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at());
    const std::uint16_t* lows = scales + form.scales();
    const StripForm strip = form.strip();
    const std::int64_t room = form.room();
    for (std::int64_t v = 0; v < room / 16; ++v)
        each_number<BITS>(tile + v * strip.nbytes(), strip, [&](std::int64_t j, const F& codes) {
            store(out + j * room + 16 * v, codes);
        });
    for (std::int64_t g = 0; g < form.groups(); ++g)
        for (std::int64_t j = 0; j < kTokens; ++j) {
            const float scale = from_half(scales[kTokens * g + j]), low = from_half(lows[kTokens * g + j]);
            float* row = out + j * room;
            for (std::int64_t d = g * form.group; d < std::min((g + 1) * form.group, form.width); ++d)
                row[d] = low + scale * row[d];
        }
}

void exact_values(const ValueForm& form, const std::uint8_t* tile, float* out) {
    for (std::int64_t i = 0; i < kTokens * form.room(); i += 16)
        store(out + i, load_halves(reinterpret_cast<const std::uint16_t*>(tile) + i));
}

void values(const ValueForm& form, const std::uint8_t* tile, float* out) {
    auto* run = form.bits == 2   ? coded_values<2>
                : form.bits == 3 ? coded_values<3>
                : form.bits == 4 ? coded_values<4>
                : form.bits == 8 ? coded_values<8>
                                 : exact_values;
    run(form, tile, out);
}

}  // namespace step

}  // namespace
