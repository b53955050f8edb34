// Codes of a tile's blocks as whole numbers, one byte each. Included by products.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "tiles.h"

namespace {

namespace products {

using subnibble::Grid;
using subnibble::kTileRows;
using subnibble::kVectorBytes;
using subnibble::block_step;
using subnibble::tile_step;
using subnibble::vector_step;
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
        return V::load_bytes(block + S * vector_step(BITS));
    } else if constexpr (BITS == 4) {
        const I vector = V::load_bytes(block + S / 2 * vector_step(BITS));
        return V::bits_and(V::template right<4 * (S % 2)>(vector), V::bytes(15));
    } else if constexpr (BITS == 2) {
        const I vector = V::load_bytes(block + S / 4 * vector_step(BITS));
        return V::bits_and(V::template right<2 * (S % 4)>(vector), V::bytes(3));
    } else if constexpr (S < 6) {
        const I vector = V::load_bytes(block + S / 2 * vector_step(BITS));
        return V::bits_and(V::template right<3 * (S % 2)>(vector), V::bytes(7));
    } else {
        const I high = V::template right<5>(V::load_bytes(block + (S - 6) * vector_step(BITS)));
        const I low = V::template right<S>(V::load_bytes(block + 2 * vector_step(BITS)));
        return V::merge(low, high, V::bytes(6), V::bytes(7));
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

// Bits by which `shifted_levels` multiplies the levels of a step: where their codes lie, if products may be that large.
template <int BITS, Kind KIND, int S>
constexpr int shift_of() {
    if constexpr (KIND != Kind::uniform || BITS == 8) return 0;
    constexpr int place = BITS == 3 && S >= 6 ? 5 : S % (BITS == 3 ? 2 : 8 / BITS) * BITS;
    return V::wide || (1 << (place + BITS)) <= 128 ? place : 0;
}

// Levels times 2^shift_of: most codes stay where they lie, which saves a shift.
template <int BITS, Kind KIND, int S>
inline I shifted_levels(const std::uint8_t* block) {
    constexpr int shift = shift_of<BITS, KIND, S>();
    if constexpr (shift == 0) {
        return levels<BITS, KIND, S>(block, 0);
    } else if constexpr (BITS == 3 && S >= 6) {
        const I low = V::template right<S - 5>(V::load_bytes(block + 2 * vector_step(BITS)));
        return V::merge(low, V::load_bytes(block + (S - 6) * vector_step(BITS)), V::bytes(0xC0), V::bytes(0xE0));
    } else {
        constexpr int steps = BITS == 3 ? 2 : 8 / BITS;
        return V::bits_and(V::load_bytes(block + S / steps * vector_step(BITS)), V::bytes(((1 << BITS) - 1) << shift));
    }
}

}  // namespace products

}  // namespace
