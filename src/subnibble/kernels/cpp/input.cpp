#include "input.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace subnibble {

namespace {

// Fewer numbers than this are not worth waking another thread.
constexpr std::int64_t kSerialNumbers = 1 << 15;

// Bytes of a token: whole blocks, and an odd number of cache lines, so that tokens side by side do not compete for the
// same lines of the processor's cache.
std::int64_t token_bytes(std::int64_t columns) { return ((columns + 63) / 64 | 1) * 64; }

}  // namespace

const float* Dense::read(std::int64_t index, float* room) const {
    if (type == Number::float32) return reinterpret_cast<const float*>(data) + index * stride;
    const std::uint8_t* from = data + 2 * index * stride;
    for (std::int64_t i = 0; i < columns; ++i) {
        std::uint16_t half;
        std::memcpy(&half, from + 2 * i, 2);
        const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
        std::memcpy(room + i, &bits, 4);
    }
    return room;
}

Input::Input(const InputScheme& scheme, std::int64_t count, std::int64_t columns)
    : scheme_(scheme), room_(count), count_(count), columns_(columns), token_stride_(token_bytes(columns)) {
    const std::int64_t inliers = columns - scheme.outliers;
    for (std::int64_t first = 0; first < inliers; first += scheme.group) bounds_.push_back(first);
    if (scheme.outliers > 0 || bounds_.empty()) bounds_.push_back(inliers);
    bounds_.push_back(columns);
    numbers_ = aligned<std::int8_t>(planes() * count_ * token_stride_);
    scales_ = aligned<float>(count_ * groups());
}

Input::Input(const Kernel& kernel, const Dense& x, const InputScheme& scheme) : Input(scheme, x.count, x.columns) {
#if defined(_OPENMP)
#pragma omp parallel if (count_ > 1 && count_ * columns_ > kSerialNumbers)
#endif
    {
        const auto room = x.type == Number::float32 ? nullptr : aligned<float>(columns_);
#if defined(_OPENMP)
#pragma omp for
#endif
        for (std::int64_t t = 0; t < count_; ++t) round(kernel, t, x.read(t, room.get()));
    }
}

void Input::resize(std::int64_t count) {
    if (count > room_) throw std::invalid_argument("the input has no room for these tokens");
    count_ = count;
}

Input Input::rest(const Kernel& kernel, const Dense& x, std::int64_t columns) const {
    Input result(scheme_, count_, columns);
    const auto room = aligned<float>(columns_), error = aligned<float>(columns);
    for (std::int64_t t = 0; t < count_; ++t) result.round_rest(kernel, *this, t, x.read(t, room.get()), error.get());
    return result;
}

void Input::round_rest(const Kernel& kernel, const Input& quantized, std::int64_t token, const float* x, float* room) {
    quantized.values(token, columns_, room);
    for (std::int64_t i = 0; i < columns_; ++i) room[i] = x[i] - room[i];
    round(kernel, token, room);
}

void Input::round(const Kernel& kernel, std::int64_t token, const float* x) {
    std::int8_t* numbers = numbers_.get() + token * token_stride_;
    float* scales = scales_.get() + token * groups();
    const std::int64_t normal = groups() - (scheme_.outliers > 0 ? 1 : 0);
    kernel.round_token(scheme_.rounding, planes(), x, bounds_.data(), normal, numbers, plane_stride(), scales);
    if (scheme_.outliers > 0) {
        const Rounding eight_bits{Rounding::Kind::symmetric, 127, 1.0f};
        kernel.round_token(eight_bits, planes(), x, bounds_.data() + normal, 1, numbers, plane_stride(),
                           scales + normal);
    }
    for (int p = 0; p < planes(); ++p)
        std::fill(numbers + p * plane_stride() + columns_, numbers + p * plane_stride() + token_stride_,
                  std::int8_t{0});
}

void Input::values(std::int64_t token, std::int64_t columns, float* out) const {
    const std::int8_t* numbers = numbers_.get() + token * token_stride_;
    for (std::int64_t g = 0; g < groups(); ++g)
        for (std::int64_t i = bounds_[g]; i < std::min(bounds_[g + 1], columns); ++i) {
            std::int32_t number = 0;
            for (int p = planes() - 1; p >= 0; --p) number = 256 * number + numbers[p * plane_stride() + i];
            out[i] = static_cast<float>(number) * scales_[token * groups() + g];
        }
}

}  // namespace subnibble
