// AMX: a core's eight tiles of 16 rows of 64 bytes, and the product of two of them. Included by avx512.h.
//
// Tiles 0 and 1 hold sums (16 tokens, 16 rows of a weight), tile 2 holds tokens (16, 64 columns), 3 and 4 levels of a
// weight (64 columns, 16 rows); 5 to 7 are as 2 to 4, of 32 columns. With SUBNIBBLE_EMULATE_AMX all of this is plain
// C++, so that what is around it can be tested on other processors.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(SUBNIBBLE_EMULATE_AMX)
#include <immintrin.h>
#endif

namespace {

namespace amx {

struct alignas(64) Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 32, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 8, 8};
};

// Constant data: GCC 12 believes that the instruction reads 8 bytes of it, and would leave out writes to the others.
constexpr Config kConfig{};

#if defined(SUBNIBBLE_EMULATE_AMX)

struct Tile {
    std::uint8_t bytes[16][64];
};
inline thread_local Tile tiles[8];

inline void begin() {}
inline void end() {}
template <int TILE>
void zero() {
    std::memset(&tiles[TILE], 0, sizeof(Tile));
}
template <int TILE>
void load(const void* from, std::int64_t stride) {
    for (int r = 0; r < kConfig.rows[TILE]; ++r)
        std::memcpy(tiles[TILE].bytes[r], static_cast<const std::uint8_t*>(from) + r * stride, kConfig.row_bytes[TILE]);
}
template <int TILE>
void store(void* to, std::int64_t stride) {
    for (int r = 0; r < kConfig.rows[TILE]; ++r)
        std::memcpy(static_cast<std::uint8_t*>(to) + r * stride, tiles[TILE].bytes[r], kConfig.row_bytes[TILE]);
}
template <int SUM, int SIGNED, int UNSIGNED>
void multiply_add() {
    for (int m = 0; m < kConfig.rows[SUM]; ++m)
        for (int n = 0; n < kConfig.row_bytes[SUM] / 4; ++n) {
            std::int32_t sum;
            std::memcpy(&sum, tiles[SUM].bytes[m] + 4 * n, 4);
            for (int k = 0; k < kConfig.rows[UNSIGNED]; ++k)
                for (int i = 0; i < 4; ++i)
                    sum += static_cast<std::int8_t>(tiles[SIGNED].bytes[m][4 * k + i]) *
                           static_cast<std::int32_t>(tiles[UNSIGNED].bytes[k][4 * n + i]);
            std::memcpy(tiles[SUM].bytes[m] + 4 * n, &sum, 4);
        }
}

#else

inline void begin() { _tile_loadconfig(&kConfig); }
inline void end() { _tile_release(); }
// GCC 12's intrinsics write their argument's text into the assembly, so that it must be a literal.
template <int TILE>
void zero() {
    static_assert(TILE == 0 || TILE == 1);
    if constexpr (TILE == 0) _tile_zero(0);
    if constexpr (TILE == 1) _tile_zero(1);
}
template <int TILE>
void load(const void* from, std::int64_t stride) {
    static_assert(TILE >= 2 && TILE <= 7);
    if constexpr (TILE == 2) _tile_loadd(2, from, stride);
    if constexpr (TILE == 3) _tile_loadd(3, from, stride);
    if constexpr (TILE == 4) _tile_loadd(4, from, stride);
    if constexpr (TILE == 5) _tile_loadd(5, from, stride);
    if constexpr (TILE == 6) _tile_loadd(6, from, stride);
    if constexpr (TILE == 7) _tile_loadd(7, from, stride);
}
template <int TILE>
void store(void* to, std::int64_t stride) {
    static_assert(TILE == 0 || TILE == 1);
    if constexpr (TILE == 0) _tile_stored(0, to, stride);
    if constexpr (TILE == 1) _tile_stored(1, to, stride);
}
template <int SUM, int SIGNED, int UNSIGNED>
void multiply_add() {
    constexpr int names = 100 * SUM + 10 * SIGNED + UNSIGNED;
    static_assert(names == 23 || names == 124 || names == 56 || names == 157);
    if constexpr (names == 23) _tile_dpbsud(0, 2, 3);
    if constexpr (names == 124) _tile_dpbsud(1, 2, 4);
    if constexpr (names == 56) _tile_dpbsud(0, 5, 6);
    if constexpr (names == 157) _tile_dpbsud(1, 5, 7);
}

#endif

}  // namespace amx

}  // namespace
