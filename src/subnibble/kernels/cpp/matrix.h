// What the kernels compute on: one column range of a packed weight, as the checkpoint stores it (docs/format.md).
#pragma once

#include <cstdint>

namespace subnibble {

enum class Grid : int { uniform = 0, sign = 1, mxfp4 = 2 };

enum class Number : int { float16 = 0, bfloat16 = 1, float32 = 2, e8m0 = 3 };

// A matrix (rows, columns). Codes of a row are one bit stream that starts on a byte; scales are (rows, groups), on a
// sign grid (rows, groups * bits). Nothing has to be aligned.
struct Matrix {
    const std::uint8_t* codes;
    const std::uint8_t* scales;
    // (rows, groups) numbers of the scales' type, or packed codes of `bits` bits; null if there are none.
    const std::uint8_t* zeros;
    std::int64_t rows;
    std::int64_t columns;
    int bits;
    // Columns that share a scale, at most `columns`; the last group may be shorter.
    std::int64_t group;
    Grid grid;
    Number scale_type;
    bool integer_zeros;
};

// How a kernel walks over a row: in chunks of `lanes` words; a word holds 8 codes (4 of 8 bits) in 32 bits.
enum class Spread : int {
    // All columns of a chunk are in one group.
    whole,
    // All columns of a word are in one group; chunks begin with a group.
    lanes,
    // All columns of a word are in one group; scales are repeated for each word.
    words,
    // Groups may end anywhere: weights are decoded one by one.
    any,
};

struct Plan {
    Spread spread;
    std::int64_t groups;
    int word_codes;
    std::int64_t chunk;
    // Chunks of a row, the last one perhaps partial.
    std::int64_t chunks;
    // Columns of all chunks.
    std::int64_t columns;
    // Floats of working memory for each thread.
    std::int64_t scratch;
};

struct Tiles;
struct Tokens;
struct Rounding;

// The functions of one instruction set.
struct Kernel {
    const char* name;
    int lanes;
    // Dense rows first .. last - 1, row `first` at `out`; type float32 or bfloat16. Null: the portable one is used.
    void (*dequantize)(const Matrix&, const Plan&, void* out, Number type, std::int64_t out_stride, std::int64_t first,
                       std::int64_t last, float* scratch);
    // y[t * y_stride + r] = (or +=, if `add`) the product of token t and row r, for rows of tiles first .. last - 1.
    // scratch: room for the panels of two tiles, or null: codes are decoded for every few tokens.
    void (*product)(const Tiles&, const Tokens&, float* y, std::int64_t y_stride, bool add, std::int64_t first,
                    std::int64_t last, std::uint8_t* scratch);
    // One token as whole numbers (rounding.h).
    void (*round_token)(const Rounding&, int planes, const float* x, const std::int64_t* bounds, std::int64_t groups,
                        std::int8_t* numbers, std::int64_t plane_stride, float* scales);
    // Sums of a token's segments (segment_sums.h).
    void (*sum_segments)(const Tokens&, std::int64_t token, std::int32_t* sums, float* float_sums);
};

extern const Kernel portable;
#if defined(SUBNIBBLE_NEON)
extern const Kernel neon;
#endif
#if defined(SUBNIBBLE_X86)
extern const Kernel avx2;
extern const Kernel avxvnni;
extern const Kernel avx512;
extern const Kernel avx512vnni;
extern const Kernel avx512amx;
#endif

}  // namespace subnibble
