// Numbers of 16 bits, converted without the help of a processor; ties to even.
#pragma once

#include <cstdint>
#include <cstring>

namespace subnibble {

inline float from_half(std::uint16_t half) {
    const std::uint32_t sign = std::uint32_t{half} >> 15 << 31, exponent = half >> 10 & 31, fraction = half & 1023;
    float value;
    if (exponent == 0) {
        value = static_cast<float>(fraction) * 0x1p-24f;
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    const std::uint32_t bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | fraction << 13;
    std::memcpy(&value, &bits, 4);
    return value;
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

}  // namespace subnibble
