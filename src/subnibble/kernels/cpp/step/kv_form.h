// How one head's keys and values lie in memory: in tiles of 32 tokens, each token either coded or at 16 bits.
//
// Keys of a tile: channel after channel, 32 tokens side by side, so that one vector holds scores of 16 tokens.
//   16 bits: 32 float16 numbers for each channel
//   8 bits: 32 bytes for each channel
//   4 bits: 16 bytes for each channel; byte l holds tokens l (low bits) and 16 + l
//   2 bits: 16 bytes for two channels; byte l, bits 4 (d mod 2) and up: tokens l and 16 + l of channel d
//   3 bits: the low two bits as above, and after them 32 bits for each channel: the high bit of each token
// then scales and lowest values, float16: by token (groups, 32) of each, by channel (2, padded width) of each if 16
// tokens always share them, else (width, 32) of each.
//
// Values of a tile: token after token, 16 channels side by side (a vector).
//   16 bits: float16 numbers, 8 bits: bytes
//   4 bits: 16 bytes for two vectors; byte l holds channel l of vectors 2 v (low bits) and 2 v + 1
//   2 bits: 16 bytes for four vectors; byte l, bits 2 (v mod 4) and up: channel l of vector v
//   3 bits: the low two bits as above, and after them 16 bits for each vector: the high bits
// then scales and lowest values, float16: (32, groups) of each.
#pragma once

#include <cstdint>

namespace subnibble {

constexpr std::int64_t kTokens = 32;
// Tiles of one head that lie side by side, then those of the next head: memory is read in long runs.
constexpr std::int64_t kRunTiles = 8, kRunTokens = kRunTiles * kTokens;
// Bits of a number that is not quantized.
constexpr int kExact = 16;

constexpr std::int64_t padded(std::int64_t count, std::int64_t step) { return (count + step - 1) / step * step; }

enum class Axis : int { token = 0, channel = 1 };

struct KeyForm {
    int bits;
    std::int64_t width;
    Axis axis;
    // Channels of a group (by token) or tokens of a group (by channel).
    std::int64_t group;

    bool exact() const { return bits == kExact; }
    std::int64_t groups() const { return (width + group - 1) / group; }
    // Whether 16 tokens always share scales, by channel.
    bool by_halves() const { return group % 16 == 0; }
    std::int64_t code_bytes() const {
        switch (bits) {
            case kExact: return 64 * width;
            case 8: return 32 * width;
            case 4: return 16 * width;
            case 3: return 16 * ((width + 1) / 2) + 4 * width;
            default: return 16 * ((width + 1) / 2);
        }
    }
    // Scales of a tile; there are as many lowest values.
    std::int64_t scales() const {
        if (exact()) return 0;
        if (axis == Axis::token) return groups() * kTokens;
        return by_halves() ? 2 * padded(width, 16) : width * kTokens;
    }
    std::int64_t scales_at() const { return padded(code_bytes(), 64); }
    std::int64_t tile_bytes() const { return padded(scales_at() + 4 * scales(), 64); }
};

struct ValueForm {
    int bits;
    std::int64_t width, group;

    bool exact() const { return bits == kExact; }
    std::int64_t groups() const { return (width + group - 1) / group; }
    std::int64_t vectors() const { return (width + 15) / 16; }
    // Bytes of a token's codes.
    std::int64_t row_bytes() const {
        const std::int64_t v = vectors();
        switch (bits) {
            case kExact: return 32 * v;
            case 8: return 16 * v;
            case 4: return 16 * ((v + 1) / 2);
            case 3: return padded(16 * ((v + 3) / 4) + 2 * v, 8);
            default: return 16 * ((v + 3) / 4);
        }
    }
    std::int64_t scales() const { return exact() ? 0 : kTokens * groups(); }
    std::int64_t scales_at() const { return padded(kTokens * row_bytes(), 64); }
    std::int64_t tile_bytes() const { return padded(scales_at() + 4 * scales(), 64); }
};

}  // namespace subnibble
