// From the sums of a segment to what it adds to the outputs. Included by products.h.
#pragma once

#include "decode.h"

namespace {

namespace products {

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
    const std::int64_t planes = KIND == Kind::sign ? w.bits : 1, at = segment.weight_group;
    const std::int64_t first = Tiles::number_at(tile, w.groups, at) + half * V::lanes;
    const std::int64_t scale = Tiles::number_at(tile, w.groups * planes, at * planes + plane) + half * V::lanes;
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

// Scale and zero-points of one vector of rows, where zero-points are whole numbers.
struct UsualGroup {
    F scale, zero;
};

// Reads those of a tile and the next one of its pair, where zero-points are whole numbers and there is one scale.
template <Kind KIND>
class UsualReader {
   public:
    UsualReader(const Tiles& w, std::int64_t tile) : type_(w.scale_type), width_(w.scale_bytes()) {
        const std::int64_t first = Tiles::number_at(tile, w.groups, 0);
        scales_ = w.scales + first * width_;
        const bool stored = KIND == Kind::uniform && w.zero == Zero::integer;
        zeros_ = stored ? w.zeros + first : same_;
        step_ = stored ? 2 * kTileRows : 0;
        for (std::uint8_t& zero : same_) zero = KIND == Kind::mxfp4 ? 12 : static_cast<std::uint8_t>(1 << (w.bits - 1));
    }

    // n: the vector of rows, counted from the tile's first.
    inline __attribute__((always_inline)) UsualGroup read(const Segment& segment, int n) const {
        const std::int64_t row = n * V::lanes;
        return {V::numbers(scales_ + (segment.weight_group * 2 * kTileRows + row) * width_, type_),
                V::to_float(V::widen(zeros_ + segment.weight_group * step_ + row))};
    }

   private:
    Number type_;
    std::int64_t width_, step_;
    const std::uint8_t *scales_, *zeros_;
    // Zero-points that are the same for all rows.
    std::uint8_t same_[2 * kTileRows];
};

// Add 65536 times the sums of the third plane, zero-points subtracted in float32.
inline F add_high(F value, I high, F zero, std::int32_t of_x) {
    const F zeros = V::mul(V::broadcast(static_cast<float>(of_x)), zero);
    return V::add(V::mul(V::sub(V::to_float(high), zeros), V::broadcast(65536.0f)), value);
}

// What a segment adds for one vector of rows, before the scale of x. low, high: sums of products, of which the high
// ones count 65536 times (three planes only); of_x: sums of x likewise. in_float: zero-points are subtracted in float32.
template <Kind KIND>
inline F scaled(const Group& group, bool in_float, bool three, I high, I low, Sums of_x) {
    F value;
    if constexpr (KIND == Kind::sign) {
        low = V::sub_int(V::add_int(low, low), V::broadcast_int(of_x.low));
        value = V::to_float(low);
        if (three) high = V::sub_int(V::add_int(high, high), V::broadcast_int(of_x.high));
    } else if (in_float) {
        value = V::sub(V::to_float(low), V::mul(V::broadcast(static_cast<float>(of_x.low)), group.zero));
        if (three) value = add_high(value, high, group.zero, of_x.high);
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

}  // namespace products

}  // namespace
