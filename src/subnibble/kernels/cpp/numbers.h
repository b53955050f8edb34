// Floats and their bits, and the numbers of 16 bits that scales are stored in. Internal linkage only, see dequantize.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"

namespace {

using subnibble::Number;

inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_half(std::uint16_t half) {
    const std::uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 0x3FFu;
    if (exponent == 31) return from_bits(sign | 0x7F800000u | mantissa << 13);
    if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return from_bits(sign | to_bits(magnitude));
}

// Magnitudes beyond the largest number of 16 bits become that number.
inline std::uint16_t to_half(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return static_cast<std::uint16_t>(sign | 0x7E00);
    if (bits >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7BFF);
    if (bits < 0x38800000) {
        // Multiples of 2^-24: adding 0.5 leaves them in the low bits.
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        std::memcpy(&bits, &magnitude, 4);
        return static_cast<std::uint16_t>(sign | (bits - 0x3F000000));
    }
    bits += 0xFFF + (bits >> 13 & 1);
    return static_cast<std::uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}

inline std::uint16_t to_bfloat16(float value) {
    const std::uint32_t bits = to_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
    return static_cast<std::uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// Nearest whole number, ties to even, of a magnitude below 2^22.
inline float nearest(float value) {
    constexpr float shift = 12582912.0f;
    return (value + shift) - shift;
}

inline std::int64_t number_bytes(Number type) {
    return type == Number::float32 ? 4 : type == Number::e8m0 ? 1 : 2;
}

// Number `index` at `from`, which need not be aligned.
inline float number(const std::uint8_t* from, Number type, std::int64_t index) {
    if (type == Number::float32) {
        float value;
        std::memcpy(&value, from + 4 * index, 4);
        return value;
    }
    if (type == Number::e8m0) {
        const std::uint32_t exponent = from[index];
        return from_bits(exponent == 0 ? 0x00400000u : exponent << 23);
    }
    std::uint16_t half;
    std::memcpy(&half, from + 2 * index, 2);
    return type == Number::float16 ? from_half(half) : from_bits(static_cast<std::uint32_t>(half) << 16);
}

}  // namespace
