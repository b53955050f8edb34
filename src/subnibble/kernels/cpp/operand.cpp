#include "operand.h"

#include <algorithm>
#include <stdexcept>

namespace subnibble {

Operand::Operand(const Input& x, std::int64_t start, std::int64_t columns, std::int64_t group)
    : start_(start), columns_(columns), group_(group) {
    if (start < 0 || start + columns > x.columns())
        throw std::invalid_argument("the weight has columns beyond those of the input");
    const std::vector<std::int64_t>& inputs = x.bounds();
    std::int64_t input_group = std::upper_bound(inputs.begin(), inputs.end(), start) - inputs.begin() - 1;
    for (std::int64_t column = 0, stop; column < columns; column = stop) {
        while (inputs[static_cast<std::size_t>(input_group) + 1] <= start + column) ++input_group;
        const std::int64_t of_weight = column / group;
        stop = std::min({(of_weight + 1) * group, columns, inputs[static_cast<std::size_t>(input_group) + 1] - start});
        const std::int64_t block = column / kBlockColumns;
        const std::int64_t blocks = (stop + kBlockColumns - 1) / kBlockColumns - block;
        segments_.push_back({block, blocks, column, of_weight, input_group});
        bounds_.push_back(column);
        room_ += blocks * kBlockColumns;
        arranged_ = arranged_ && column % kBlockColumns == 0 &&
                    (stop % kBlockColumns == 0 || (start + stop == x.columns() && start % kBlockColumns == 0));
    }
    bounds_.push_back(columns);
    if (!arranged_) {
        numbers_ = aligned<std::int8_t>(x.planes() * x.count() * room_);
        std::int64_t place = 0;
        for (Segment& segment : segments_) {
            segment.offset = place;
            place += segment.blocks * kBlockColumns;
        }
    }
    const auto count = static_cast<std::int64_t>(segments_.size());
    sums_ = aligned<std::int32_t>(x.count() * count * x.planes());
    float_sums_ = aligned<float>(x.count() * count);
    tokens_.segments = segments_.data(), tokens_.segment_count = count;
    tokens_.sums = sums_.get(), tokens_.float_sums = float_sums_.get();
}

void Operand::read(const Kernel& kernel, const Input& x) {
    attach(x);
    for (std::int64_t t = 0; t < x.count(); ++t) read(kernel, x, t);
}

void Operand::attach(const Input& x) {
    tokens_.planes = x.planes(), tokens_.fixed = x.fixed(), tokens_.count = x.count();
    tokens_.scales = x.scales(), tokens_.scale_stride = x.groups();
    if (arranged_) {
        tokens_.numbers = x.numbers() + start_;
        tokens_.token_stride = x.token_stride(), tokens_.plane_stride = x.plane_stride();
    } else {
        tokens_.numbers = numbers_.get(), tokens_.token_stride = room_, tokens_.plane_stride = x.count() * room_;
    }
}

void Operand::read(const Kernel& kernel, const Input& x, std::int64_t token) {
    if (!arranged_) arrange(x, token);
    const std::int64_t count = tokens_.segment_count;
    kernel.sum_segments(tokens_, token, sums_.get() + token * count * x.planes(), float_sums_.get() + token * count);
}

void Operand::arrange(const Input& x, std::int64_t token) {
    for (int p = 0; p < x.planes(); ++p) {
        const std::int8_t* from = x.numbers() + p * x.plane_stride() + token * x.token_stride() + start_;
        std::int8_t* to = numbers_.get() + (p * x.count() + token) * room_;
        std::fill(to, to + room_, std::int8_t{0});
        for (std::size_t s = 0; s < segments_.size(); ++s) {
            const Segment& segment = segments_[s];
            std::copy(from + bounds_[s], from + bounds_[s + 1],
                      to + segment.offset + bounds_[s] - segment.block * kBlockColumns);
        }
    }
}

}  // namespace subnibble
