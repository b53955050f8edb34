// A packed weight in the order in which processors multiply it, and the quantized tokens that it is multiplied with.
//
// 16 rows are a tile, two tiles are a pair, 32 columns of a tile are a block. A block holds 64 * bits bytes: vectors of
// 64 bytes, 4 bytes for each row, so that an instruction that adds products of 4 bytes gives each row its own sum. The
// tiles of a pair alternate, and so do their scales: two tiles multiplied at once are one stream from memory. In the 4
// bytes of a row, byte j holds codes of columns 4 s + j of the block:
//   2 bits: vector v (of 2), bits 2 (s - 4 v) and up, for s = 4 v .. 4 v + 3
//   3 bits: vector v (of 3), bits 3 (s - 2 v) and up, for s = 2 v, 2 v + 1; of s = 6 and 7 the high two bits are bits 6
//     and 7 of vector s - 6, and the low bit is bit s of vector 2
//   4 bits: vector v (of 4), bits 4 (s - 2 v) and up, for s = 2 v, 2 v + 1
//   8 bits: vector s
// Rows and columns beyond the last are zeros; the last pair is whole.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace subnibble {

constexpr std::int64_t kTileRows = 16, kBlockColumns = 32, kVectorBytes = 64;
// From a tile's vector to its next, and from a vector of a pair's first tile to that of the second. Vectors of tiles
// alternate, but blocks where a block has three vectors: each was measured to be read fastest from memory.
constexpr std::int64_t vector_step(int bits) { return bits == 3 ? kVectorBytes : 2 * kVectorBytes; }
constexpr std::int64_t tile_step(int bits) { return bits == 3 ? 3 * kVectorBytes : kVectorBytes; }
// From a tile's block to its next.
constexpr std::int64_t block_step(int bits) { return 2 * kVectorBytes * bits; }

// What is subtracted from a code: the same for all, one whole number per group, or one real number per group.
enum class Zero : int { constant = 0, integer = 1, real = 2 };

struct Tiles {
    std::int64_t rows, columns, group, groups, tiles, blocks;
    int bits;
    Grid grid;
    // float16, bfloat16 or float32.
    Number scale_type;
    Zero zero;
    // (pairs, blocks, bits, 2, 64) bytes; of 3 bits (pairs, blocks, 2, bits, 64).
    const std::uint8_t* codes;
    // (pairs, groups, planes, 2, 16) numbers of scale_type.
    const std::uint8_t* scales;
    // (pairs, groups, 2, 16): bytes if zero is integer, numbers of scale_type if real; else null.
    const std::uint8_t* zeros;

    // Scales of a group: a sign grid has one for each bit.
    std::int64_t planes() const { return grid == Grid::sign ? bits : 1; }
    std::int64_t pairs() const { return (tiles + 1) / 2; }
    std::int64_t pair_bytes() const { return blocks * block_step(bits); }
    // Where a tile's first vector lies.
    std::int64_t tile_at(std::int64_t tile) const { return tile / 2 * pair_bytes() + tile % 2 * tile_step(bits); }
    // Place of a tile's row 0 among numbers (pairs, count, 2, 16), of number `index` of `count`.
    static std::int64_t number_at(std::int64_t tile, std::int64_t count, std::int64_t index) {
        return ((tile / 2 * count + index) * 2 + tile % 2) * kTileRows;
    }
    std::int64_t scale_bytes() const { return scale_type == Number::float32 ? 4 : 2; }
};

// Columns that are in one group of the weight and in one group of the input.
struct Segment {
    std::int64_t block, blocks;
    // Place of its first column's number in a token.
    std::int64_t offset;
    std::int64_t weight_group, input_group;
};

// Tokens as whole numbers: x = scale * sum over planes p of 256^p * number[p].
struct Tokens {
    // The number of column c, token t and plane p: numbers[p * plane_stride + t * token_stride + c].
    const std::int8_t* numbers;
    std::int64_t token_stride, plane_stride;
    int planes;
    // Whether they are fixed-point numbers of inputs that have no scheme.
    bool fixed;
    std::int64_t count;
    // (tokens, groups of the input).
    const float* scales;
    std::int64_t scale_stride;
    // (tokens, segments, planes): sums of a segment's numbers.
    const std::int32_t* sums;
    // (tokens, segments): of planes 0 and 1 together, as float32.
    const float* float_sums;
    const Segment* segments;
    std::int64_t segment_count;
};

// How a token is quantized when a linear runs (docs/format.md, "Activations").
struct Rounding {
    enum class Kind : int { symmetric = 0, asymmetric = 1, mxfp4 = 2, fixed = 3 };
    Kind kind;
    // Largest number: 127, 7 or 3 of a symmetric one, 255, 15 or 7 of an asymmetric one.
    std::int32_t last;
    float clip;
};

}  // namespace subnibble
