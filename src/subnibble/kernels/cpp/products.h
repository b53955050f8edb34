// Products of tiles with whole-numbered tokens, written once for every instruction set. A source file defines its
// vector type `V` in an unnamed namespace and includes this file, which has internal linkage only (see dequantize.h).
//
// Sums of products within a segment are exact, modulo 2^32. What follows is float32 with one rounding for each
// operation, in the order of the reference (runtime/integer.py): (sum - zero * sum of x) * scale * scale of x, segments
// from left to right, planes of a sign grid from bit 0 on.
#include <cstddef>
#include <cstring>
#include <utility>

#include "tiles.h"

namespace {

namespace products {

using subnibble::Grid;
using subnibble::kTileRows;
using subnibble::kVectorBytes;
using subnibble::Number;
using subnibble::Rounding;
using subnibble::Segment;
using subnibble::Tiles;
using subnibble::Tokens;
using subnibble::Zero;
using F = V::F;
using I = V::I;

// Vectors of a tile, and bytes of a vector.
constexpr int kHalves = static_cast<int>(kTileRows) / V::lanes;
constexpr int kBytes = 4 * V::lanes;

enum class Kind { uniform, sign, mxfp4 };

template <std::size_t... S, typename Function>
inline __attribute__((always_inline)) void each(std::index_sequence<S...>, Function function) {
    (function(std::integral_constant<int, static_cast<int>(S)>{}), ...);
}

// Codes of step S (columns 4 S .. 4 S + 3) of a block, one byte each.
template <int BITS, int S>
inline I codes(const std::uint8_t* block) {
    if constexpr (BITS == 8) {
        return V::load_bytes(block + S * kVectorBytes);
    } else if constexpr (BITS == 4) {
        return V::bits_and(V::template right<4 * (S % 2)>(V::load_bytes(block + S / 2 * kVectorBytes)), V::bytes(15));
    } else if constexpr (BITS == 2) {
        return V::bits_and(V::template right<2 * (S % 4)>(V::load_bytes(block + S / 4 * kVectorBytes)), V::bytes(3));
    } else if constexpr (S < 6) {
        return V::bits_and(V::template right<3 * (S % 2)>(V::load_bytes(block + S / 2 * kVectorBytes)), V::bytes(7));
    } else {
        const I low = V::template right<6>(V::load_bytes(block + (S - 6) * kVectorBytes));
        const I high = V::template right<S - 2>(V::load_bytes(block + 2 * kVectorBytes));
        return V::merge(high, low, V::bytes(3), V::bytes(7));
    }
}

// Whole numbers 0 .. 255 of step S: codes, bit `plane` of them on a sign grid, or levels of MXFP4 plus 12.
template <int BITS, Kind KIND, int S>
inline I levels(const std::uint8_t* block, int plane) {
    const I code = codes<BITS, S>(block);
    if constexpr (KIND == Kind::sign) return V::bits_and(V::right_by(code, plane), V::bytes(1));
    if constexpr (KIND == Kind::mxfp4) return V::choose_bytes(V::e2m1_levels(), code);
    return code;
}

struct Sums {
    std::int32_t high, low;
};

// Scale and zero-points of one vector of rows in one segment.
struct Group {
    F scale, zero;
    // Zero-points as whole numbers.
    I integer_zero;
};

template <Kind KIND>
inline Group group_of(const Tiles& w, std::int64_t tile, int half, const Segment& segment, int plane) {
    const std::int64_t planes = KIND == Kind::sign ? w.bits : 1, at = tile * w.groups + segment.weight_group;
    const std::int64_t first = kTileRows * at + half * V::lanes;
    const std::int64_t scale = kTileRows * (at * planes + plane) + half * V::lanes;
    Group group;
    group.scale = V::numbers(w.scales + scale * w.scale_bytes(), w.scale_type);
    if (KIND == Kind::uniform && w.zero == Zero::real) {
        group.zero = V::numbers(w.zeros + first * w.scale_bytes(), w.scale_type);
        group.integer_zero = V::broadcast_int(0);
    } else {
        group.integer_zero = KIND == Kind::uniform && w.zero == Zero::integer
                                 ? V::widen(w.zeros + first)
                                 : V::broadcast_int(KIND == Kind::mxfp4 ? 12 : 1 << (w.bits - 1));
        group.zero = V::to_float(group.integer_zero);
    }
    return group;
}

// What a segment adds for one vector of rows, before the scale of x. low, high: sums of products, of which the high ones
// count 65536 times (three planes only); of_x: sums of x likewise. in_float: zero-points are subtracted in float32.
template <Kind KIND>
inline F scaled(const Group& group, bool in_float, bool three, I high, I low, Sums of_x) {
    F value;
    if constexpr (KIND == Kind::sign) {
        low = V::sub_int(V::add_int(low, low), V::broadcast_int(of_x.low));
        value = V::to_float(low);
        if (three) high = V::sub_int(V::add_int(high, high), V::broadcast_int(of_x.high));
    } else if (in_float) {
        value = V::sub(V::to_float(low), V::mul(V::broadcast(static_cast<float>(of_x.low)), group.zero));
        if (three) {
            const F zeros = V::mul(V::broadcast(static_cast<float>(of_x.high)), group.zero);
            value = V::add(V::mul(V::sub(V::to_float(high), zeros), V::broadcast(65536.0f)), value);
        }
        return V::mul(value, group.scale);
    } else {
        value = V::to_float(V::sub_int(low, V::mul_int(group.integer_zero, V::broadcast_int(of_x.low))));
        if (three) high = V::sub_int(high, V::mul_int(group.integer_zero, V::broadcast_int(of_x.high)));
    }
    if (three) value = V::add(V::mul(V::to_float(high), V::broadcast(65536.0f)), value);
    return V::mul(value, group.scale);
}

// Whether zero-points are subtracted in float32: where sums are below 2^24 and so exact, and where inputs are fixed-point
// numbers, whose rounding is coarser.
inline bool sums_fit_float(const Tiles& w, const Tokens& x, const Segment& segment) {
    return x.fixed || (x.planes == 1 && (segment.blocks * 32 << (w.bits + 7)) < 1 << 24);
}

// Sums of x over a segment, of the planes that count 65536 times and of the others.
inline Sums sums_of(const Tokens& x, std::int64_t token, std::int64_t segment) {
    const std::int32_t* sums = x.sums + (token * x.segment_count + segment) * x.planes;
    if (x.planes == 1) return {0, sums[0]};
    const auto low = static_cast<std::int32_t>(static_cast<std::uint32_t>(sums[0]) +
                                               256u * static_cast<std::uint32_t>(sums[1]));
    return {x.planes == 3 ? sums[2] : 0, low};
}

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

// One or two tokens: codes are decoded in registers. T tiles, M tokens, P planes.
template <int BITS, Kind KIND, int P, int T, int M>
void few_tiles(const Tiles& w, const Tokens& x, std::int64_t tile, std::int64_t token, float* y, std::int64_t y_stride,
               bool add) {
    constexpr int N = T * kHalves;
    constexpr auto steps = std::make_index_sequence<8>{};
    // Bytes of codes that are on their way from memory.
    constexpr std::int64_t kAhead = 4096;
    F total[M][N];
    load_totals<T, M>(w, tile, y, y_stride, add, total);
    for (std::int64_t s = 0; s < x.segment_count; ++s) {
        const Segment& segment = x.segments[s];
        const std::int8_t* numbers = x.numbers + token * x.token_stride + segment.offset;
        const std::uint8_t* first = w.codes + tile * w.tile_bytes() + segment.block * kVectorBytes * BITS;
        // Several sums of each, where there are too few to keep the processor's multipliers busy.
        constexpr int C = M * P * N == 1 ? 4 : M * P * N == 2 ? 2 : 1;
        I sum[C][M][P][N];
        all<C * M * P, N>([&](int i, int n) { sum[i / (M * P)][i / P % M][i % P][n] = V::broadcast_int(0); });
        for (std::int64_t b = 0; b < segment.blocks; ++b) {
            const std::uint8_t* block = first + b * kVectorBytes * BITS;
            const std::int8_t* from = numbers + 32 * b;
            for (int t = 0; t < T; ++t)
                for (int v = 0; v < BITS; ++v)
                    __builtin_prefetch(block + t * w.tile_bytes() + v * kVectorBytes + kAhead);
            each(steps, [&](auto step) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    const std::uint8_t* of_tile = block + n / kHalves * w.tile_bytes() + n % kHalves * kBytes;
                    const I level = levels<BITS, KIND, step>(of_tile, 0);
#pragma GCC unroll 2
                    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
                        for (int p = 0; p < P; ++p) {
                            I& one = sum[step % C][m][p][n];
                            one = V::template dot<BITS == 8>(
                                one, level, V::broadcast_bytes(from + p * x.plane_stride + m * x.token_stride + 4 * step));
                        }
                }
            });
        }
        const bool in_float = w.zero == Zero::real || sums_fit_float(w, x, segment);
        const float* scales_of_x = x.scales + token * x.scale_stride + segment.input_group;
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const Group group = group_of<KIND>(w, tile + n / kHalves, n % kHalves, segment, 0);
#pragma GCC unroll 2
            for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
                for (int c = 1; c < C; ++c)
#pragma GCC unroll 3
                    for (int p = 0; p < P; ++p) sum[0][m][p][n] = V::add_int(sum[0][m][p][n], sum[c][m][p][n]);
                I low = sum[0][m][0][n];
                if constexpr (P > 1) low = V::add_int(low, V::template left<8>(sum[0][m][1][n]));
                F value;
                if (P < 3 && in_float) {
                    // The usual case of `scaled`, without its branches.
                    const F of_x = V::broadcast(x.float_sums[(token + m) * x.segment_count + s]);
                    value = V::mul(V::sub(V::to_float(low), V::mul(of_x, group.zero)), group.scale);
                } else {
                    value = scaled<KIND>(group, in_float, P == 3, sum[0][m][P - 1][n], low, sums_of(x, token + m, s));
                }
                total[m][n] = V::add(total[m][n], V::mul(value, V::broadcast(scales_of_x[m * x.scale_stride])));
            }
        }
    }
    store_totals<T, M>(w, tile, y, y_stride, total);
}

template <int BITS, Kind KIND, int P, int M>
void few_tokens(const Tiles& w, const Tokens& x, std::int64_t token, float* y, std::int64_t y_stride, bool add,
                std::int64_t first, std::int64_t last) {
    // Tile by tile: codes are read in the order in which they lie.
    y += token * y_stride;
    for (std::int64_t tile = first; tile < last; ++tile)
        few_tiles<BITS, KIND, P, 1, M>(w, x, tile, token, y + tile * kTileRows, y_stride, add);
}

template <int BITS, Kind KIND, int P>
void few(const Tiles& w, const Tokens& x, float* y, std::int64_t y_stride, bool add, std::int64_t first,
         std::int64_t last) {
    std::int64_t token = 0;
    for (; x.count - token >= 2; token += 2) few_tokens<BITS, KIND, P, 2>(w, x, token, y, y_stride, add, first, last);
    if (token < x.count) few_tokens<BITS, KIND, P, 1>(w, x, token, y, y_stride, add, first, last);
}

// Write the levels of a tile as bytes: (planes, blocks, 8 steps, 16 rows, 4 columns).
template <int BITS, Kind KIND>
void fill_panel(const Tiles& w, std::int64_t tile, std::uint8_t* panel) {
    const std::uint8_t* first = w.codes + tile * w.tile_bytes();
    for (int plane = 0; plane < (KIND == Kind::sign ? BITS : 1); ++plane)
        for (std::int64_t b = 0; b < w.blocks; ++b) {
            const std::uint8_t* block = first + b * kVectorBytes * BITS;
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

#if defined(SUBNIBBLE_USES_AMX)
constexpr int kTileTokens = 16;

// One plane of 16 tokens times two panels: writes (panel, token, row) to `sums`.
inline void tile_products(const std::uint8_t* panel, std::int64_t panel_bytes, const std::int8_t* numbers,
                          std::int64_t token_stride, std::int64_t blocks, std::int32_t* sums) {
    // A tile holds 64 columns, two blocks.
    constexpr std::int64_t kLevels = 16 * kVectorBytes;
    amx::zero<0>();
    amx::zero<1>();
    for (std::int64_t i = 0; i < blocks / 2; ++i) {
        amx::load<2>(numbers + 64 * i, token_stride);
        amx::load<3>(panel + kLevels * i, kVectorBytes);
        amx::load<4>(panel + panel_bytes + kLevels * i, kVectorBytes);
        amx::multiply_add<0, 2, 3>();
        amx::multiply_add<1, 2, 4>();
    }
    if (blocks % 2 != 0) {
        amx::load<5>(numbers + 64 * (blocks / 2), token_stride);
        amx::load<6>(panel + kLevels * (blocks / 2), kVectorBytes);
        amx::load<7>(panel + panel_bytes + kLevels * (blocks / 2), kVectorBytes);
        amx::multiply_add<0, 5, 6>();
        amx::multiply_add<1, 5, 7>();
    }
    amx::store<0>(sums, kVectorBytes);
    amx::store<1>(sums + kTileTokens * kTileRows, kVectorBytes);
}

// 16 tokens and two tiles of rows; like `many_tile`.
template <Kind KIND>
void many_tile_amx(const Tiles& w, const Tokens& x, std::int64_t tile, std::int64_t token, const std::uint8_t* panel,
                   std::int64_t panel_bytes, float* y, std::int64_t y_stride, bool add) {
    constexpr int M = kTileTokens, N = 2;
    static_assert(kHalves == 1, "a vector holds the rows of a tile");
    const bool three = x.planes == 3, real = w.zero == Zero::real;
    F total[M][N];
    load_totals<N, M>(w, tile, y, y_stride, add, total);
    for (std::int64_t s = 0; s < x.segment_count; ++s) {
        const Segment& segment = x.segments[s];
        const std::int8_t* numbers = x.numbers + token * x.token_stride + segment.offset;
        const bool in_float = KIND != Kind::sign && (real || sums_fit_float(w, x, segment));
        const float* scales_of_x = x.scales + token * x.scale_stride + segment.input_group;
        for (int plane = 0; plane < (KIND == Kind::sign ? w.bits : 1); ++plane) {
            const std::uint8_t* from = panel + (plane * w.blocks + segment.block) * 8 * kVectorBytes;
            alignas(64) std::int32_t sums[3][N * M * kTileRows];
            for (int p = 0; p < x.planes; ++p)
                tile_products(from, panel_bytes, numbers + p * x.plane_stride, x.token_stride, segment.blocks, sums[p]);
            for (int n = 0; n < N; ++n) {
                const Group group = group_of<KIND>(w, tile + n, 0, segment, plane);
                for (int m = 0; m < M; ++m) {
                    const std::int64_t at = (n * M + m) * kTileRows;
                    I low = V::load_bytes(sums[0] + at);
                    if (x.planes > 1) low = V::add_int(low, V::template left<8>(V::load_bytes(sums[1] + at)));
                    const I high = three ? V::load_bytes(sums[2] + at) : low;
                    const F value = scaled<KIND>(group, in_float, three, high, low, sums_of(x, token + m, s));
                    total[m][n] = V::add(total[m][n], V::mul(value, V::broadcast(scales_of_x[m * x.scale_stride])));
                }
            }
        }
    }
    store_totals<N, M>(w, tile, y, y_stride, total);
}
#endif

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
    const std::uint8_t *const next = w.codes + (tile + T) * w.tile_bytes(), *const end = w.codes + w.tiles * w.tile_bytes();
    const std::int64_t lines = T * w.tile_bytes() / kVectorBytes, calls = (last - first + 7) / 8 * x.segment_count;
    const Ahead ahead{next < end ? next : end, next + T * w.tile_bytes() < end ? next + T * w.tile_bytes() : end,
                      (lines + calls - 1) / calls};
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

template <int BITS, Kind KIND>
void product_of(const Tiles& w, const Tokens& x, float* y, std::int64_t y_stride, bool add, std::int64_t first,
                std::int64_t last, std::uint8_t* scratch) {
    if constexpr (KIND != Kind::sign) {
        if (scratch == nullptr) {
            auto* run = x.planes == 1 ? few<BITS, KIND, 1> : x.planes == 2 ? few<BITS, KIND, 2> : few<BITS, KIND, 3>;
            return run(w, x, y, y_stride, add, first, last);
        }
    }
    many<BITS, KIND>(w, x, y, y_stride, add, first, last, scratch);
}

void product(const Tiles& w, const Tokens& x, float* y, std::int64_t y_stride, bool add, std::int64_t first,
             std::int64_t last, std::uint8_t* scratch) {
    auto* run = w.grid == Grid::mxfp4  ? product_of<4, Kind::mxfp4>
                : w.grid == Grid::sign ? (w.bits == 2   ? product_of<2, Kind::sign>
                                          : w.bits == 3 ? product_of<3, Kind::sign>
                                                        : product_of<4, Kind::sign>)
                : w.bits == 2          ? product_of<2, Kind::uniform>
                : w.bits == 3          ? product_of<3, Kind::uniform>
                : w.bits == 4          ? product_of<4, Kind::uniform>
                                       : product_of<8, Kind::uniform>;
    run(w, x, y, y_stride, add, first, last, scratch);
}

}  // namespace products

}  // namespace
