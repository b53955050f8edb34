// Tokens that linears multiply, as whole numbers; an input owns them.
#pragma once

#include <vector>

#include "matrix.h"
#include "memory.h"
#include "tiles.h"

namespace subnibble {

// Tokens as they lie in memory: (count, columns) float32 or bfloat16, `stride` elements from token to token.
struct Dense {
    const std::uint8_t* data;
    Number type;
    std::int64_t count, columns, stride;

    // Token `index` as float32: in place, or written to `room`.
    const float* read(std::int64_t index, float* room) const;
};

// How a token's groups are rounded.
struct InputScheme {
    Rounding rounding;
    // Columns of a group; the last group may be shorter.
    std::int64_t group;
    // Last columns, which are one group of 8 bits, symmetric and not clipped.
    std::int64_t outliers;
    // Of numbers, 1 .. 3.
    int planes;
};

class Input {
   public:
    // Room for `count` tokens.
    Input(const InputScheme& scheme, std::int64_t count, std::int64_t columns);
    Input(const Kernel& kernel, const Dense& x, const InputScheme& scheme);

    // Hold other tokens from now on, at most as many as there was room for at first; `round` gives them values. None of
    // these functions allocates.
    void resize(std::int64_t count);
    // Round token `token`, x: (columns) float32.
    void round(const Kernel& kernel, std::int64_t token, const float* x);
    // Round what token `token` of `quantized`, made of x, lacks of x, in this input's columns. room: (columns).
    void round_rest(const Kernel& kernel, const Input& quantized, std::int64_t token, const float* x, float* room);

    // The error of this input's first `columns` columns, rounded by the same scheme. x: what this input was made of.
    Input rest(const Kernel& kernel, const Dense& x, std::int64_t columns) const;

    std::int64_t count() const { return count_; }
    std::int64_t columns() const { return columns_; }
    int planes() const { return scheme_.planes; }
    bool fixed() const { return scheme_.rounding.kind == Rounding::Kind::fixed; }
    std::int64_t groups() const { return static_cast<std::int64_t>(bounds_.size()) - 1; }
    // First column of each group, and the number of columns.
    const std::vector<std::int64_t>& bounds() const { return bounds_; }
    // Numbers of plane 0, token 0; zeros follow the last column, at least to a multiple of 32.
    const std::int8_t* numbers() const { return numbers_.get(); }
    std::int64_t token_stride() const { return token_stride_; }
    std::int64_t plane_stride() const { return token_stride_ * count_; }
    const float* scales() const { return scales_.get(); }

   private:
    // What a token is worth, up to column `columns`.
    void values(std::int64_t token, std::int64_t columns, float* out) const;

    InputScheme scheme_;
    std::int64_t room_, count_, columns_, token_stride_;
    std::vector<std::int64_t> bounds_;
    Aligned<std::int8_t> numbers_;
    Aligned<float> scales_;
};

}  // namespace subnibble
