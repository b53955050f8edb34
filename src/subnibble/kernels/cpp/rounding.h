// Tokens to whole numbers, written once for every instruction set; included like dequantize.h.
#pragma once

#include <cstdint>

#include "numbers.h"
#include "tiles.h"

namespace {

namespace rounding {

using subnibble::Rounding;

// Values that are rounded at a time, on the stack.
constexpr std::int64_t kChunk = 256;
constexpr float kSmallestScale = 0x1p-120f;

inline float at_least(float value, float low) { return value < low ? low : value; }
inline float at_most(float value, float high) { return value > high ? high : value; }

// A scale as it is stored: a bfloat16.
inline float stored(float scale) {
    const std::uint32_t half = to_bfloat16(at_least(scale, kSmallestScale));
    return from_bits(half << 16);
}

// Bits of the largest magnitude. They are in the order of the magnitudes; those that are not finite come last.
inline std::uint32_t largest_bits(const float* x, std::int64_t count) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint32_t magnitude = to_bits(x[i]) & 0x7FFFFFFFu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

struct Range {
    float low, high;
};

// Smallest and largest value, 0 among them.
inline Range range_of(const float* x, std::int64_t count) {
    // Order of floats as whole numbers: of negative ones, the other way round.
    const auto key = [](std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7FFFFFFF); };
    std::int32_t low = 0, high = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int32_t one = key(static_cast<std::int32_t>(to_bits(x[i])));
        low = one < low ? one : low;
        high = one > high ? one : high;
    }
    return {from_bits(static_cast<std::uint32_t>(key(low))), from_bits(static_cast<std::uint32_t>(high))};
}

// How a group becomes whole numbers. worth: what a number of 1 stands for, NaN if a value of the group is not finite.
struct Step {
    float worth, scale, zero;
};

inline Step step_of(const Rounding& how, int planes, const float* x, std::int64_t count) {
    const std::uint32_t largest = largest_bits(x, count);
    if (largest >= 0x7F800000u) return {from_bits(0x7FC00000u), 1.0f, 0.0f};
    const float max_abs = from_bits(largest), last = static_cast<float>(how.last);
    if (how.kind == Rounding::Kind::fixed) {
        // Planes of numbers up to 127, 127 * 257 and 127 * 65793 are within -128 .. 127. Of three planes, the largest
        // value may be rounded up by one, so some numbers are left free.
        const float limit = planes == 1 ? 127.0f : planes == 2 ? 32639.0f : 8355584.0f;
        const float scale = at_least(max_abs / limit, kSmallestScale);
        return {scale, scale, 0.0f};
    }
    if (how.kind == Rounding::Kind::symmetric) {
        const float scale = stored(how.clip * max_abs / last);
        return {scale, scale, 0.0f};
    }
    if (how.kind == Rounding::Kind::asymmetric) {
        const Range range = range_of(x, count);
        const float scale = stored(how.clip * (range.high - range.low) / last);
        return {scale, scale, at_most(at_least(nearest(how.clip * -range.low / scale), 0.0f), last)};
    }
    // Of a magnitude in [2^e, 2^(e + 1)): 2^(e - 2), within 2^-126 .. 2^127. Subnormal ones are below the smallest.
    const std::int32_t exponent = static_cast<std::int32_t>(largest >> 23) - 2;
    const float scale = from_bits(static_cast<std::uint32_t>(exponent < 1 ? 1 : exponent) << 23);
    return {0.5f * scale, scale, 0.0f};
}

// Nearest level of E2M1, in halves.
inline std::int32_t e2m1_halves(float value) {
    const float magnitude = value < 0.0f ? -value : value;
    const float spacing = magnitude < 2.0f ? 0.5f : magnitude < 4.0f ? 1.0f : 2.0f;
    const float level = at_most(at_least(nearest(value / spacing) * spacing, -6.0f), 6.0f);
    return static_cast<std::int32_t>(2.0f * level);
}

inline void round_values(const Rounding& how, const Step& step, const float* x, std::int64_t count, std::int32_t* out) {
    const float last = static_cast<float>(how.last), scale = step.scale, zero = step.zero;
    if (step.worth != step.worth) {
        for (std::int64_t i = 0; i < count; ++i) out[i] = 0;
    } else if (how.kind == Rounding::Kind::fixed) {
        V::round_to_int(x, 1.0f / scale, count, out);
    } else if (how.kind == Rounding::Kind::symmetric) {
        for (std::int64_t i = 0; i < count; ++i)
            out[i] = static_cast<std::int32_t>(at_most(at_least(nearest(x[i] / scale), -last), last));
    } else if (how.kind == Rounding::Kind::asymmetric) {
        for (std::int64_t i = 0; i < count; ++i)
            out[i] = static_cast<std::int32_t>(at_most(at_least(nearest(x[i] / scale) + zero, 0.0f), last) - zero);
    } else {
        for (std::int64_t i = 0; i < count; ++i) out[i] = e2m1_halves(x[i] / scale);
    }
}

// Split numbers into bytes, the lowest first, each -128 .. 127.
inline void split(std::int32_t* numbers, std::int64_t count, int planes, std::int8_t* to, std::int64_t plane_stride) {
    for (int p = 0; p < planes; ++p, to += plane_stride)
        for (std::int64_t i = 0; i < count; ++i) {
            const auto low = static_cast<std::int8_t>(numbers[i]);
            to[i] = low;
            numbers[i] = (numbers[i] - low) >> 8;
        }
}

// Round a token group by group. bounds: group g has columns bounds[g] .. bounds[g + 1] - 1.
// numbers: plane p at numbers + p * plane_stride. scales: one for each group.
void round_token(const Rounding& how, int planes, const float* x, const std::int64_t* bounds, std::int64_t groups,
                 std::int8_t* numbers, std::int64_t plane_stride, float* scales) {
    for (std::int64_t g = 0; g < groups; ++g) {
        const Step step = step_of(how, planes, x + bounds[g], bounds[g + 1] - bounds[g]);
        scales[g] = step.worth;
        for (std::int64_t i = bounds[g]; i < bounds[g + 1]; i += kChunk) {
            const std::int64_t count = bounds[g + 1] - i < kChunk ? bounds[g + 1] - i : kChunk;
            std::int32_t whole[kChunk];
            round_values(how, step, x + i, count, whole);
            split(whole, count, planes, numbers + i, plane_stride);
        }
    }
}

}  // namespace rounding

}  // namespace
