// Products of many tokens: codes are decoded once, into panels that stay in the cache. Included by products.h.
#pragma once

#include "decode.h"
#include "outputs.h"
#include "scaling.h"
#if defined(SUBNIBBLE_USES_AMX)
#include "many_amx.h"
#endif

namespace {

namespace products {

// Write the levels of a tile as bytes: (planes, blocks, 8 steps, 16 rows, 4 columns).
template <int BITS, Kind KIND>
void fill_panel(const Tiles& w, std::int64_t tile, std::uint8_t* panel) {
    const std::uint8_t* first = w.codes + w.tile_at(tile);
    for (int plane = 0; plane < (KIND == Kind::sign ? BITS : 1); ++plane)
        for (std::int64_t b = 0; b < w.blocks; ++b) {
            const std::uint8_t* block = first + b * block_step(BITS);
            std::uint8_t* to = panel + (plane * w.blocks + b) * 8 * kVectorBytes;
            each(std::make_index_sequence<8>{}, [&](auto step) {
                for (int half = 0; half < kHalves; ++half)
                    V::store_bytes(to + step * kVectorBytes + half * kBytes,
                             levels<BITS, KIND, step>(block + half * kBytes, plane));
            });
        }
}

// One plane of x times T panels: adds to `sum`, which stays in registers.
template <bool WIDE, int T, int M>
inline __attribute__((always_inline)) void add_products(const std::uint8_t* panel, std::int64_t panel_bytes,
                                                        const std::int8_t* numbers, std::int64_t token_stride,
                                                        std::int64_t blocks, I (&sum)[M][T * kHalves]) {
    constexpr int N = T * kHalves;
    const std::uint8_t* const end = panel + 8 * blocks * kVectorBytes;
    for (; panel < end; panel += kVectorBytes, numbers += 4) {
        I level[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) level[n] = V::load_bytes(panel + n / kHalves * panel_bytes + n % kHalves * kBytes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const I x = V::broadcast_bytes(numbers + m * token_stride);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = V::template dot<WIDE>(sum[m][n], level[n], x);
        }
    }
}

// Codes of the next tiles, which are called from memory bit by bit while these are multiplied.
struct Ahead {
    const std::uint8_t *at, *end;
    // Cache lines for each segment and call.
    std::int64_t lines;

    void step() {
        for (std::int64_t i = 0; i < lines && at < end; ++i, at += kVectorBytes) __builtin_prefetch(at, 0, 2);
    }
};

template <Kind KIND, bool WIDE, int T, int M>
void many_tile(const Tiles& w, const Tokens& x, std::int64_t tile, std::int64_t token, const std::uint8_t* panel,
               std::int64_t panel_bytes, float* y, std::int64_t y_stride, bool add, Ahead& ahead) {
    constexpr int N = T * kHalves;
    const bool three = x.planes == 3, real = w.zero == Zero::real;
    F total[M][N];
    load_totals<T, M>(w, tile, y, y_stride, add, total);
    for (std::int64_t s = 0; s < x.segment_count; ++s) {
        ahead.step();
        const Segment& segment = x.segments[s];
        const std::int8_t* numbers = x.numbers + token * x.token_stride + segment.offset;
        for (int plane = 0; plane < (KIND == Kind::sign ? w.bits : 1); ++plane) {
            const std::uint8_t* from = panel + (plane * w.blocks + segment.block) * 8 * kVectorBytes;
            I sum[M][N], high[M][N];
            all<M, N>([&](int m, int n) { sum[m][n] = V::broadcast_int(0); });
            for (int p = x.planes - 1; p >= 0; --p) {
                add_products<WIDE, T, M>(from, panel_bytes, numbers + p * x.plane_stride, x.token_stride,
                                         segment.blocks, sum);
                if (p == 2)
                    all<M, N>([&](int m, int n) { high[m][n] = sum[m][n], sum[m][n] = V::broadcast_int(0); });
                else if (p == 1)
                    all<M, N>([&](int m, int n) { sum[m][n] = V::template left<8>(sum[m][n]); });
            }
            const bool in_float = KIND != Kind::sign && (real || sums_fit_float(w, x, segment));
            const float* sums_of_x = x.float_sums + token * x.segment_count + s;
            const float* scales_of_x = x.scales + token * x.scale_stride + segment.input_group;
            Group group[N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n)
                group[n] = group_of<KIND>(w, tile + n / kHalves, n % kHalves, segment, plane);
            if (in_float && !three) {
                // The usual case of `scaled`, without its branches.
                all<M, N>([&](int m, int n) {
                    const F zeros = V::mul(V::broadcast(sums_of_x[m * x.segment_count]), group[n].zero);
                    const F value = V::mul(V::sub(V::to_float(sum[m][n]), zeros), group[n].scale);
                    total[m][n] = V::add(total[m][n], V::mul(value, V::broadcast(scales_of_x[m * x.scale_stride])));
                });
            } else {
                I low[M][N];
                all<M, N>([&](int m, int n) { low[m][n] = sum[m][n]; });
                for (int m = 0; m < M; ++m)
                    for (int n = 0; n < N; ++n) {
                        const F value = scaled<KIND>(group[n], in_float, three, three ? high[m][n] : low[m][n], low[m][n],
                                                     sums_of(x, token + m, s));
                        total[m][n] = V::add(total[m][n], V::mul(value, V::broadcast(scales_of_x[m * x.scale_stride])));
                    }
            }
        }
    }
    store_totals<T, M>(w, tile, y, y_stride, total);
}

template <Kind KIND, bool WIDE, int T>
void many_tokens(const Tiles& w, const Tokens& x, std::int64_t tile, std::int64_t first, std::int64_t last,
                 const std::uint8_t* panel, std::int64_t panel_bytes, float* y, std::int64_t y_stride, bool add,
                 Ahead ahead) {
    std::int64_t token = first;
    y += tile * kTileRows;
#if defined(SUBNIBBLE_USES_AMX)
    if constexpr (T == 2) {
        amx::begin();
        for (; last - token >= kTileTokens; token += kTileTokens)
            many_tile_amx<KIND>(w, x, tile, token, panel, panel_bytes, y + token * y_stride, y_stride, add);
        amx::end();
    }
#endif
    if constexpr (V::registers >= 32)
        for (; last - token >= 8; token += 8)
            many_tile<KIND, WIDE, T, 8>(w, x, tile, token, panel, panel_bytes, y + token * y_stride, y_stride, add,
                                        ahead);
    for (; last - token >= 4; token += 4)
        many_tile<KIND, WIDE, T, 4>(w, x, tile, token, panel, panel_bytes, y + token * y_stride, y_stride, add,
                                        ahead);
    for (; last - token >= 2; token += 2)
        many_tile<KIND, WIDE, T, 2>(w, x, tile, token, panel, panel_bytes, y + token * y_stride, y_stride, add,
                                        ahead);
    if (token < last)
        many_tile<KIND, WIDE, T, 1>(w, x, tile, token, panel, panel_bytes, y + token * y_stride, y_stride, add,
                                        ahead);
}

// Many tokens: the codes of T tiles are decoded once, into panels that stay in the processor's cache.
template <int BITS, Kind KIND, int T>
void many_of_tiles(const Tiles& w, const Tokens& x, std::int64_t tile, std::int64_t first, std::int64_t last,
                   std::uint8_t* panel, float* y, std::int64_t y_stride, bool add) {
    const std::int64_t panel_bytes = w.planes() * w.blocks * 8 * kVectorBytes;
    for (int t = 0; t < T; ++t) fill_panel<BITS, KIND>(w, tile + t, panel + t * panel_bytes);
    // The next pair; of one tile, half of it is for the second.
    const std::int64_t pair = tile / 2 + 1, calls = (last - first + 7) / 8 * x.segment_count;
    const std::int64_t lines = w.pair_bytes() / kVectorBytes, of_call = (lines * T / 2 + calls - 1) / calls;
    const std::uint8_t* const next = w.codes + pair * w.pair_bytes();
    const Ahead ahead{next, pair < w.pairs() ? next + w.pair_bytes() : next, of_call};
    many_tokens<KIND, BITS == 8, T>(w, x, tile, first, last, panel, panel_bytes, y, y_stride, add, ahead);
}

// scratch: room for 2 panels.
template <int BITS, Kind KIND>
void many(const Tiles& w, const Tokens& x, float* y, std::int64_t y_stride, bool add, std::int64_t first,
          std::int64_t last, std::uint8_t* scratch) {
    constexpr int T = V::registers >= 32 ? 2 : 1;
    // Bytes of x that stay in the cache while all tiles pass.
    constexpr std::int64_t kResident = 3 << 18;
    std::int64_t together = kResident / (w.columns * x.planes) / 8 * 8;
    if (together < 32) together = 32;
    for (std::int64_t from = 0; from < x.count; from += together) {
        const std::int64_t to = from + together < x.count ? from + together : x.count;
        std::int64_t tile = first;
        for (; tile + T <= last; tile += T)
            many_of_tiles<BITS, KIND, T>(w, x, tile, from, to, scratch, y, y_stride, add);
        for (; tile < last; ++tile) many_of_tiles<BITS, KIND, 1>(w, x, tile, from, to, scratch, y, y_stride, add);
    }
}

}  // namespace products

}  // namespace
