// Products of tiles with whole-numbered tokens, written once for every instruction set. A source file defines its
// vector type `V` in an unnamed namespace and includes this file, which has internal linkage only (see dequantize.h).
//
// Sums of products within a segment are exact, modulo 2^32. What follows is float32 with one rounding for each
// operation, in the order of the reference (runtime/integer.py): (sum - zero * sum of x) * scale * scale of x, segments
// from left to right, planes of a sign grid from bit 0 on.
#pragma once

#include "few.h"
#include "many.h"
#include "tiles.h"

namespace {

namespace products {

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
