// Products of one or two tokens: codes are decoded in registers. Included by products.h.
#pragma once

#include "decode.h"
#include "outputs.h"
#include "scaling.h"

namespace {

namespace products {

// Vectors of sums that stay in registers.
constexpr int kMostSums = V::registers >= 32 ? 20 : 12;

// Shifts of levels (`shift_of`), and the sums of products with levels that are shifted alike.
// SHIFTED: whether levels stay shifted. BITS, KIND: of the weight.
template <int BITS, Kind KIND, bool SHIFTED>
struct Shifts {
    template <int S>
    static constexpr int of = SHIFTED ? shift_of<BITS, KIND, S>() : 0;
    template <int... S>
    static constexpr unsigned seen(std::integer_sequence<int, S...>) {
        return (0u | ... | (1u << of<S>));
    }
    // Bit i: whether levels are shifted by i.
    static constexpr unsigned used = seen(std::make_integer_sequence<int, 8>{});
    // Number of shifts below `shift`.
    static constexpr int place(int shift) {
        int count = 0;
        for (int i = 0; i < shift; ++i) count += used >> i & 1;
        return count;
    }
    static constexpr int count = place(8);
};

// Sum of products of a segment: of N vectors of rows, M tokens, P planes; of C sums each, which are added in the end.
template <int BITS, Kind KIND, int P, int T, int M>
struct Few {
    static constexpr int N = T * kHalves;
    static constexpr bool SHIFTED = M * P * N * Shifts<BITS, KIND, true>::count <= kMostSums;
    using Sets = Shifts<BITS, KIND, SHIFTED>;
    // Sums of a set, where there are too few to keep the processor's multipliers busy.
    static constexpr int C = M * P * N * Sets::count >= 4 ? 1 : M * P * N * Sets::count >= 2 ? 2 : 4;
    I sum[Sets::count * C][M][P][N];

    inline __attribute__((always_inline)) void clear() {
#pragma GCC unroll 32
        for (int i = 0; i < Sets::count * C * M * P; ++i)
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[i / (M * P)][i / P % M][i % P][n] = V::broadcast_int(0);
    }

    template <int S>
    inline __attribute__((always_inline)) void add_step(const Tokens& x, const std::uint8_t* block,
                                                        const std::int8_t* from) {
        constexpr int set = Sets::place(Sets::template of<S>) * C + S % C;
#pragma GCC unroll 2
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
            for (int p = 0; p < P; ++p) {
                const I numbers = V::broadcast_bytes(from + p * x.plane_stride + m * x.token_stride + 4 * S);
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    const std::uint8_t* of_tile = block + n / kHalves * tile_step(BITS) + n % kHalves * kBytes;
                    const I level =
                        SHIFTED ? shifted_levels<BITS, KIND, S>(of_tile) : levels<BITS, KIND, S>(of_tile, 0);
                    sum[set][m][p][n] = V::template dot<(BITS == 8 || V::wide)>(sum[set][m][p][n], level, numbers);
                }
            }
    }

    // Sums of shifted levels are multiples of 2^shift, so nothing is lost.
    template <int SHIFT>
    inline __attribute__((always_inline)) void gather(int m, int p, int n, I& total) const {
        if constexpr ((Sets::used >> SHIFT & 1) != 0) {
            constexpr int set = Sets::place(SHIFT) * C;
            I one = sum[set][m][p][n];
#pragma GCC unroll 4
            for (int c = 1; c < C; ++c) one = V::add_int(one, sum[set + c][m][p][n]);
            if constexpr (SHIFT == 0)
                total = one;
            else
                total = V::add_int(total, V::template signed_right<SHIFT>(one));
        }
    }

    inline __attribute__((always_inline)) I plane(int m, int p, int n) const {
        I result;
        each(std::make_index_sequence<8>{},
             [&](auto shift) __attribute__((always_inline)) { gather<shift>(m, p, n, result); });
        return result;
    }

    // Sums of planes 0 and 1, and of plane 2.
    inline __attribute__((always_inline)) I low(int m, int n) const {
        if constexpr (P == 1) return plane(m, 0, n);
        return V::add_int(plane(m, 0, n), V::template left<8>(plane(m, P > 1, n)));
    }
    inline __attribute__((always_inline)) I high(int m, int n) const { return plane(m, P - 1, n); }
};

template <int N, int M>
struct SegmentSums {
    I low[M][N], high[M][N];
};

template <int N, int M>
struct Scaled {
    F of[M][N];
};

// What a segment adds, in all cases; apart from the loop, so that the usual case keeps its registers.
template <Kind KIND, int P, int N, int M>
__attribute__((noinline)) Scaled<N, M> scaled_segment(const Tiles& w, const Tokens& x, std::int64_t tile,
                                                      std::int64_t token, std::int64_t s,
                                                      const SegmentSums<N, M>& sums) {
    const Segment& segment = x.segments[s];
    const bool in_float = w.zero == Zero::real || sums_fit_float(w, x, segment);
    Scaled<N, M> values;
    for (int n = 0; n < N; ++n) {
        const Group group = group_of<KIND>(w, tile + n / kHalves, n % kHalves, segment, 0);
        for (int m = 0; m < M; ++m)
            values.of[m][n] = scaled<KIND>(group, in_float, P == 3, sums.high[m][n], sums.low[m][n],
                                           sums_of(x, token + m, s));
    }
    return values;
}

// T tiles, one or a pair; M tokens, P planes.
template <int BITS, Kind KIND, int P, int T, int M>
void few_tiles(const Tiles& w, const Tokens& x, std::int64_t tile, std::int64_t token, float* y, std::int64_t y_stride,
               bool add) {
    constexpr int N = T * kHalves;
    constexpr auto steps = std::make_index_sequence<8>{};
    // Bytes of codes that are on their way from memory.
    constexpr std::int64_t kAhead = 4096;
    const std::uint8_t* const codes = w.codes + w.tile_at(tile);
    const bool usual = w.zero != Zero::real;
    const UsualReader<KIND> reader(w, tile);
    F total[M][N];
    load_totals<T, M>(w, tile, y, y_stride, add, total);
    for (std::int64_t s = 0; s < x.segment_count; ++s) {
        const Segment& segment = x.segments[s];
        const std::int8_t* numbers = x.numbers + token * x.token_stride + segment.offset;
        Few<BITS, KIND, P, T, M> sums;
        sums.clear();
        for (std::int64_t b = 0; b < segment.blocks; ++b) {
            const std::uint8_t* block = codes + (segment.block + b) * block_step(BITS);
#pragma GCC unroll 16
            for (int v = 0; v < T * BITS; ++v)
                __builtin_prefetch(block + v * (T == 2 ? kVectorBytes : vector_step(BITS)) + kAhead);
            each(steps, [&](auto step) __attribute__((always_inline)) {
                sums.template add_step<step>(x, block, numbers + 32 * b);
            });
        }
        const float* scales_of_x = x.scales + token * x.scale_stride + segment.input_group;
        if (usual && sums_fit_float(w, x, segment)) {
            const float* sums_of_x = x.float_sums + token * x.segment_count + s;
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const UsualGroup group = reader.read(segment, n);
#pragma GCC unroll 2
                for (int m = 0; m < M; ++m) {
                    const F zeros = V::mul(V::broadcast(sums_of_x[m * x.segment_count]), group.zero);
                    F value = V::sub(V::to_float(sums.low(m, n)), zeros);
                    if constexpr (P == 3)
                        value = add_high(value, sums.high(m, n), group.zero, sums_of(x, token + m, s).high);
                    value = V::mul(value, group.scale);
                    total[m][n] = V::add(total[m][n], V::mul(value, V::broadcast(scales_of_x[m * x.scale_stride])));
                }
            }
        } else {
            SegmentSums<N, M> whole;
            all<M, N>([&](int m, int n) { whole.low[m][n] = sums.low(m, n), whole.high[m][n] = sums.high(m, n); });
            const Scaled<N, M> values = scaled_segment<KIND, P, N, M>(w, x, tile, token, s, whole);
            all<M, N>([&](int m, int n) {
                const F scale = V::broadcast(scales_of_x[m * x.scale_stride]);
                total[m][n] = V::add(total[m][n], V::mul(values.of[m][n], scale));
            });
        }
    }
    store_totals<T, M>(w, tile, y, y_stride, total);
}

template <int BITS, Kind KIND, int P, int M>
void few_tokens(const Tiles& w, const Tokens& x, std::int64_t token, float* y, std::int64_t y_stride, bool add,
                std::int64_t first, std::int64_t last) {
    // Both tiles of a pair use a vector of x that is read once.
    constexpr int T = 2 * kHalves * M * P <= kMostSums ? 2 : 1;
    y += token * y_stride;
    for (std::int64_t tile = first; tile < last;) {
        if (T == 2 && tile % 2 == 0 && tile + 1 < last) {
            few_tiles<BITS, KIND, P, T, M>(w, x, tile, token, y + tile * kTileRows, y_stride, add);
            tile += 2;
        } else {
            few_tiles<BITS, KIND, P, 1, M>(w, x, tile, token, y + tile * kTileRows, y_stride, add);
            tile += 1;
        }
    }
}

template <int BITS, Kind KIND, int P>
void few(const Tiles& w, const Tokens& x, float* y, std::int64_t y_stride, bool add, std::int64_t first,
         std::int64_t last) {
    std::int64_t token = 0;
    for (; x.count - token >= 2; token += 2) few_tokens<BITS, KIND, P, 2>(w, x, token, y, y_stride, add, first, last);
    if (token < x.count) few_tokens<BITS, KIND, P, 1>(w, x, token, y, y_stride, add, first, last);
}

}  // namespace products

}  // namespace
