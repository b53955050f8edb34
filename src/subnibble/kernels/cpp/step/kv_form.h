// How one head's keys and values lie in memory: in tiles of 32 tokens, each token either coded or at 16 bits.
//
// Codes lie in strips. A strip has 16 lanes side by side (tokens of keys, channels of values). Along it run the numbers
// that a product sums (channels of keys, tokens of values), four to a quad: a vector of 64 bytes, byte 4 lane + i is
// number i of a lane. So the instruction that adds four products of bytes adds to each lane's sum.
//   8 bits: 64 bytes for each quad
//   4 bits: 64 bytes for two quads, the first in the low bits
//   2 bits: 64 bytes for four quads; bits 2 (quad mod 4) and up
//   3 bits: the low two bits of all quads as above, then 64 bytes for eight quads; bit quad mod 8 is the high bit
//
// Keys of a tile: a strip for each half of the tokens; at 16 bits, 32 float16 numbers for each channel.
// Values of a tile: a strip for each 16 channels; at 16 bits, float16 numbers, token after token, channels padded to 16.
// Behind codes are scales, then lowest values, float16. By token: (groups, 32) of each. Keys by channel:
// (2, padded width) of each if 16 tokens always share them, else (width, 32) of each.
#pragma once

#include <cstdint>

namespace subnibble {

constexpr std::int64_t kTokens = 32;
// Tiles of one head that lie side by side, then those of the next head: memory is read in long runs.
constexpr std::int64_t kRunTiles = 8, kRunTokens = kRunTiles * kTokens;
// Bits of a number that is not quantized.
constexpr int kExact = 16;
constexpr std::int64_t kStripLanes = 16, kStripVector = 64;

constexpr std::int64_t padded(std::int64_t count, std::int64_t step) { return (count + step - 1) / step * step; }

enum class Axis : int { token = 0, channel = 1 };

struct StripForm {
    int bits;
    // A multiple of four.
    std::int64_t quads;

    // Vectors before those of high bits.
    std::int64_t low_vectors() const { return quads * (bits == 3 ? 2 : bits) / 8; }
    std::int64_t nbytes() const { return kStripVector * (low_vectors() + (bits == 3 ? (quads + 7) / 8 : 0)); }
};

struct KeyForm {
    int bits;
    std::int64_t width;
    Axis axis;
    // Channels of a group (by token) or tokens of a group (by channel).
    std::int64_t group;

    bool exact() const { return bits == kExact; }
    std::int64_t groups() const { return (width + group - 1) / group; }
    std::int64_t room() const { return padded(width, 16); }
    StripForm strip() const { return {bits, room() / 4}; }
    // Whether 16 tokens always share scales, by channel.
    bool by_halves() const { return group % 16 == 0; }
    // Whether codes are multiplied as whole numbers: four quads always share what their sums are multiplied by.
    bool whole() const { return !exact() && (axis == Axis::channel ? by_halves() : group % 16 == 0 || groups() == 1); }
    std::int64_t code_bytes() const { return exact() ? 2 * kTokens * width : 2 * strip().nbytes(); }
    // Scales of a tile; there are as many lowest values.
    std::int64_t scales() const {
        if (exact()) return 0;
        if (axis == Axis::token) return groups() * kTokens;
        return by_halves() ? 2 * room() : width * kTokens;
    }
    // Where the scale of a token's channel is.
    std::int64_t scale_of(std::int64_t lane, std::int64_t d) const {
        if (axis == Axis::token) return d / group * kTokens + lane;
        return by_halves() ? lane / 16 * room() + d : d * kTokens + lane;
    }
    std::int64_t scales_at() const { return padded(code_bytes(), 64); }
    std::int64_t tile_bytes() const { return padded(scales_at() + 4 * scales(), 64); }
};

struct ValueForm {
    int bits;
    std::int64_t width, group;

    bool exact() const { return bits == kExact; }
    std::int64_t groups() const { return (width + group - 1) / group; }
    std::int64_t room() const { return padded(width, 16); }
    StripForm strip() const { return {bits, kTokens / 4}; }
    // Whether codes are multiplied as whole numbers: 16 channels share their scales.
    bool whole() const { return !exact() && (group % 16 == 0 || groups() == 1); }
    std::int64_t code_bytes() const { return exact() ? 2 * kTokens * room() : room() / 16 * strip().nbytes(); }
    std::int64_t scales() const { return exact() ? 0 : kTokens * groups(); }
    std::int64_t scale_of(std::int64_t lane, std::int64_t d) const { return d / group * kTokens + lane; }
    std::int64_t scales_at() const { return padded(code_bytes(), 64); }
    std::int64_t tile_bytes() const { return padded(scales_at() + 4 * scales(), 64); }
};

}  // namespace subnibble
