// Products of 16 tokens and two tiles on AMX. Included by many.h.
#pragma once

#include "amx.h"
#include "outputs.h"
#include "scaling.h"

namespace {

namespace products {

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

}  // namespace products

}  // namespace
