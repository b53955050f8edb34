#include "repack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace subnibble {

namespace {

// `bits` ones at the beginning of every `step` bits.
constexpr std::uint64_t repeated(int bits, int step) {
    std::uint64_t word = 0;
    for (int at = 0; at < 64; at += step) word |= ((std::uint64_t{1} << bits) - 1) << at;
    return word;
}

// Codes of a bit stream as bytes: `count` of them, the stream has no more. out: room for a multiple of 8.
template <int BITS>
void unpack(const std::uint8_t* stream, std::int64_t count, std::uint8_t* out) {
    const std::int64_t bytes = (count * BITS + 7) / 8;
    for (std::int64_t first = 0; first < count; first += 8) {
        // 8 codes fill BITS bytes.
        const std::int64_t at = first / 8 * BITS;
        std::uint64_t word = 0;
        // Byte by byte: a load of more than was stored would wait.
        if (bytes - at >= BITS)
            for (int i = 0; i < BITS; ++i) word |= std::uint64_t{stream[at + i]} << 8 * i;
        else
            for (std::int64_t i = at; i < bytes; ++i) word |= std::uint64_t{stream[i]} << 8 * (i - at);
        // Halves, quarters and eighths of the word move apart.
        word = (word | word << (32 - 4 * BITS)) & repeated(4 * BITS, 32);
        word = (word | word << (16 - 2 * BITS)) & repeated(2 * BITS, 16);
        word = (word | word << (8 - BITS)) & repeated(BITS, 8);
        std::memcpy(out + first, &word, 8);
    }
}

void unpack(int bits, const std::uint8_t* stream, std::int64_t count, std::uint8_t* out) {
    if (bits == 8)
        std::memcpy(out, stream, static_cast<std::size_t>(count));
    else
        (bits == 2 ? unpack<2> : bits == 3 ? unpack<3> : unpack<4>)(stream, count, out);
}

std::uint32_t four_bytes(const std::uint8_t* from) {
    std::uint32_t word;
    std::memcpy(&word, from, 4);
    return word;
}

// Place 32 codes of a row in its block (tiles.h). block: at the row's first 4 bytes.
template <int BITS>
void place(const std::uint8_t* codes, std::uint8_t* block) {
    std::uint32_t step[8], word[8] = {};
    for (int s = 0; s < 8; ++s) step[s] = four_bytes(codes + 4 * s);
    if constexpr (BITS == 8) {
        for (int s = 0; s < 8; ++s) word[s] = step[s];
    } else if constexpr (BITS == 4) {
        for (int s = 0; s < 8; ++s) word[s / 2] |= step[s] << 4 * (s % 2);
    } else if constexpr (BITS == 2) {
        for (int s = 0; s < 8; ++s) word[s / 4] |= step[s] << 2 * (s % 4);
    } else {
        for (int s = 0; s < 6; ++s) word[s / 2] |= step[s] << 3 * (s % 2);
        for (int s = 6; s < 8; ++s) {
            word[s - 6] |= (step[s] & 0x06060606u) << 5;
            word[2] |= (step[s] & 0x01010101u) << s;
        }
    }
    for (int v = 0; v < BITS; ++v) std::memcpy(block + v * vector_step(BITS), word + v, 4);
}

template <int BITS>
void place_row(const std::uint8_t* codes, std::int64_t blocks, std::uint8_t* row) {
    for (std::int64_t b = 0; b < blocks; ++b) place<BITS>(codes + kBlockColumns * b, row + b * block_step(BITS));
}

// Blocks of a row that are unpacked at a time.
constexpr std::int64_t kBlocks = 16;
// Of codes that are repacked before their pages are given back.
constexpr std::int64_t kPieceBytes = 1 << 23;

// Half of a scale of E8M0, whose levels are counted in halves, as bfloat16: exact.
std::uint16_t half_of_e8m0(std::uint8_t exponent) {
    if (exponent < 2) return exponent == 1 ? 0x0040 : 0x0020;
    return static_cast<std::uint16_t>(exponent == 255 ? 0x7F80 : (exponent - 1) << 7);
}

}  // namespace

Repacked::Repacked(const Matrix& w) {
    if ((w.grid == Grid::mxfp4) != (w.scale_type == Number::e8m0))
        throw std::invalid_argument("scales of type E8M0 belong to the grid of MXFP4, and to no other");
    Tiles& t = tiles_;
    t.rows = w.rows, t.columns = w.columns, t.bits = w.bits, t.grid = w.grid;
    t.group = std::max<std::int64_t>(w.group, 1);
    t.groups = (w.columns + t.group - 1) / t.group;
    t.tiles = (w.rows + kTileRows - 1) / kTileRows;
    t.blocks = (w.columns + kBlockColumns - 1) / kBlockColumns;
    t.scale_type = w.scale_type == Number::e8m0 ? Number::bfloat16 : w.scale_type;
    t.zero = w.zeros == nullptr ? Zero::constant : w.integer_zeros ? Zero::integer : Zero::real;
    const std::int64_t planes = t.planes(), numbers = t.groups * planes, width = t.scale_bytes();
    const std::int64_t code_bytes = t.pairs() * t.pair_bytes();
    const std::int64_t padded = t.pairs() * 2 * kTileRows, scale_bytes = padded * numbers * width;
    const std::int64_t zero_width = t.zero == Zero::integer ? 1 : t.zero == Zero::real ? width : 0;
    const std::int64_t zero_bytes = padded * t.groups * zero_width;
    // Codes come first, in whole vectors; scales begin on a boundary of 64 bytes, too.
    nbytes_ = code_bytes + scale_bytes + zero_bytes;
    memory_ = long_lived(nbytes_);
    std::uint8_t *const codes_at = memory_.get(), *const scales_at = codes_at + code_bytes;
    std::uint8_t* const zeros_at = t.zero == Zero::constant ? nullptr : scales_at + scale_bytes;
    t.codes = codes_at, t.scales = scales_at, t.zeros = zeros_at;

    const std::int64_t row_bytes = (w.columns * w.bits + 7) / 8, zero_row_bytes = (t.groups * w.bits + 7) / 8;
    const std::int64_t source_width = w.scale_type == Number::e8m0 ? 1 : width;
    const bool threads = w.rows * w.columns > 1 << 18;
    // Some tiles at a time: the pages of the file that they came from are given back at once.
    const std::int64_t some = std::max<std::int64_t>(1, kPieceBytes / std::max<std::int64_t>(1, kTileRows * row_bytes));
    for (std::int64_t first_tile = 0; first_tile < padded / kTileRows; first_tile += some) {
        const std::int64_t last_tile = std::min(padded / kTileRows, first_tile + some);
#if defined(_OPENMP)
#pragma omp parallel for if (threads)
#endif
        for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
            // Rows write to the same lines of a tile: some blocks at a time, which stay in the cache.
            for (std::int64_t first = 0; first < t.blocks; first += kBlocks) {
                const std::int64_t blocks = std::min(kBlocks, t.blocks - first), column = first * kBlockColumns;
                for (std::int64_t lane = 0; lane < kTileRows; ++lane) {
                    const std::int64_t r = tile * kTileRows + lane;
                    // Columns behind the last one have code 0.
                    std::uint8_t codes[kBlocks * kBlockColumns] = {};
                    const std::int64_t count = std::min(blocks * kBlockColumns, w.columns - column);
                    if (r < w.rows) unpack(w.bits, w.codes + r * row_bytes + column * w.bits / 8, count, codes);
                    std::fill(codes + count, codes + blocks * kBlockColumns, std::uint8_t{0});
                    auto* to = codes_at + t.tile_at(tile) + first * block_step(w.bits) + 4 * lane;
                    (w.bits == 2   ? place_row<2>
                     : w.bits == 3 ? place_row<3>
                     : w.bits == 4 ? place_row<4>
                                   : place_row<8>)(codes, blocks, to);
                }
            }
        }
        const std::int64_t row = first_tile * kTileRows, last_row = std::min(w.rows, last_tile * kTileRows);
        if (row < last_row) not_needed_soon(w.codes + row * row_bytes, (last_row - row) * row_bytes);
    }
#if defined(_OPENMP)
#pragma omp parallel if (threads)
#endif
    {
        const auto zeros = aligned<std::uint8_t>(t.groups + 8);
#if defined(_OPENMP)
#pragma omp for
#endif
        for (std::int64_t r = 0; r < padded; ++r) {
            const std::int64_t tile = r / kTileRows, lane = r % kTileRows;
            for (std::int64_t i = 0; i < numbers; ++i) {
                std::uint8_t* scale = scales_at + (Tiles::number_at(tile, numbers, i) + lane) * width;
                if (r >= w.rows) {
                    std::memset(scale, 0, static_cast<std::size_t>(width));
                } else if (w.scale_type == Number::e8m0) {
                    const std::uint16_t half = half_of_e8m0(w.scales[r * numbers + i]);
                    std::memcpy(scale, &half, 2);
                } else {
                    std::memcpy(scale, w.scales + (r * numbers + i) * source_width, static_cast<std::size_t>(width));
                }
            }
            if (t.zero == Zero::integer && r < w.rows)
                unpack(w.bits, w.zeros + r * zero_row_bytes, t.groups, zeros.get());
            for (std::int64_t g = 0; g < t.groups && t.zero != Zero::constant; ++g) {
                std::uint8_t* zero = zeros_at + (Tiles::number_at(tile, t.groups, g) + lane) * zero_width;
                if (r >= w.rows)
                    std::memset(zero, 0, static_cast<std::size_t>(zero_width));
                else if (t.zero == Zero::integer)
                    *zero = zeros[g];
                else
                    std::memcpy(zero, w.zeros + (r * t.groups + g) * width, static_cast<std::size_t>(width));
            }
        }
    }
}

}  // namespace subnibble
