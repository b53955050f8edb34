// Sums of a token's numbers over each segment, written once for every instruction set; included like dequantize.h.
#pragma once

#include "tiles.h"

namespace {

// Write the sums of all segments of one token. sums: (segments, planes). float_sums: (segments).
void sum_segments(const subnibble::Tokens& x, std::int64_t token, std::int32_t* sums, float* float_sums) {
    using I = V::I;
    const I ones = V::bytes(1);
    for (std::int64_t s = 0; s < x.segment_count; ++s) {
        const subnibble::Segment& segment = x.segments[s];
        std::int64_t low = 0;
        for (int p = 0; p < x.planes; ++p) {
            const std::int8_t* from = x.numbers + p * x.plane_stride + token * x.token_stride + segment.offset;
            // All lanes have the same sum. Four of them wait for each other less.
            I sum[4] = {V::broadcast_int(0), V::broadcast_int(0), V::broadcast_int(0), V::broadcast_int(0)};
            for (std::int64_t i = 0; i < segment.blocks * subnibble::kBlockColumns; i += 16)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    sum[j] = V::template dot<false>(sum[j], ones, V::broadcast_bytes(from + i + 4 * j));
            alignas(64) std::int32_t lanes[V::lanes];
            V::store_bytes(lanes, V::add_int(V::add_int(sum[0], sum[1]), V::add_int(sum[2], sum[3])));
            sums[s * x.planes + p] = lanes[0];
            if (p < 2) low += lanes[0] * (p == 0 ? std::int64_t{1} : std::int64_t{256});
        }
        float_sums[s] = static_cast<float>(low);
    }
}

}  // namespace
