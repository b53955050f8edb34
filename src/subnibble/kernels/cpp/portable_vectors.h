// Vectors in plain C++, right on every processor.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "numbers.h"

namespace {

struct V {
    static constexpr int lanes = 8, registers = 16;
    struct F {
        float v[8];
    };
    struct I {
        std::uint32_t v[8];
    };
    template <int BITS>
    struct Table {
        float levels[16];
        float zero;
    };

    template <typename Function>
    static F each(Function function) {
        F result;
        for (int i = 0; i < 8; ++i) result.v[i] = function(i);
        return result;
    }
    static F zero() { return broadcast(0.0f); }
    static F broadcast(float value) {
        return each([=](int) { return value; });
    }
    static I load_int(const std::int32_t* from) {
        I result;
        std::memcpy(&result, from, 32);
        return result;
    }
    static void store(float* to, F a) { std::memcpy(to, a.v, 32); }
    static F mul(F a, F b) {
        return each([&](int i) { return a.v[i] * b.v[i]; });
    }
    static F sub(F a, F b) {
        return each([&](int i) { return a.v[i] - b.v[i]; });
    }
    static F choose(const float* from, I pattern) {
        return each([&](int i) { return from[pattern.v[i]]; });
    }
    static F permute(F a, I lane) {
        return each([&](int i) { return a.v[lane.v[i]]; });
    }
    static I permute(I a, I lane) {
        I result;
        for (int i = 0; i < 8; ++i) result.v[i] = a.v[lane.v[i]];
        return result;
    }
    static I shift_right(I a, I count) {
        I result;
        for (int i = 0; i < 8; ++i) result.v[i] = a.v[i] >> count.v[i];
        return result;
    }
    template <int BITS>
    static I words(const std::uint8_t* from) {
        constexpr int bytes = BITS == 8 ? 4 : BITS;
        I result;
        for (int i = 0; i < 8; ++i) {
            result.v[i] = 0;
            for (int b = 0; b < bytes; ++b) result.v[i] |= static_cast<std::uint32_t>(from[bytes * i + b]) << 8 * b;
        }
        return result;
    }
    template <int BITS>
    static const float* levels(const float* from) {
        return from;
    }
    template <int BITS>
    static Table<BITS> table(const float* from, F subtract) {
        Table<BITS> result;
        for (int i = 0; i < 16; ++i) result.levels[i] = from[i] - subtract.v[0];
        result.zero = subtract.v[0];
        return result;
    }
    template <int BITS>
    static F look_up(const Table<BITS>& table, I codes) {
        if constexpr (BITS == 8)
            return each([&](int i) { return static_cast<float>(codes.v[i] & 255) - table.zero; });
        else
            return each([&](int i) { return table.levels[codes.v[i] & ((1 << BITS) - 1)]; });
    }
    static bool from_halves(const std::uint8_t*, std::int64_t, float*) { return false; }

    // ---- for products ----
    static I load_bytes(const void* from) {
        I result;
        std::memcpy(&result, from, 32);
        return result;
    }
    static void store_bytes(void* to, I a) { std::memcpy(to, a.v, 32); }
    static F load_floats(const float* from) {
        return each([=](int i) { return from[i]; });
    }
    static void store_floats(float* to, F a) { store(to, a); }
    template <typename Function>
    static I each_int(Function function) {
        I result;
        for (int i = 0; i < 8; ++i) result.v[i] = function(i);
        return result;
    }
    static I bytes(int value) {
        return each_int([=](int) { return static_cast<std::uint32_t>(value) * 0x01010101u; });
    }
    static I broadcast_int(std::int32_t value) {
        return each_int([=](int) { return static_cast<std::uint32_t>(value); });
    }
    static I broadcast_bytes(const std::int8_t* from) {
        std::uint32_t four = 0;
        for (int i = 0; i < 4; ++i) four |= static_cast<std::uint32_t>(static_cast<std::uint8_t>(from[i])) << 8 * i;
        return each_int([=](int) { return four; });
    }
    template <int COUNT>
    static I right(I a) {
        return right_by(a, COUNT);
    }
    // Of signed words.
    template <int COUNT>
    static I signed_right(I a) {
        return each_int(
            [&](int i) { return static_cast<std::uint32_t>(static_cast<std::int32_t>(a.v[i]) >> COUNT); });
    }
    template <int COUNT>
    static I left(I a) {
        return each_int([&](int i) { return a.v[i] << COUNT; });
    }
    static I right_by(I a, int count) {
        return each_int([&](int i) { return a.v[i] >> count; });
    }
    static I bits_and(I a, I b) {
        return each_int([&](int i) { return a.v[i] & b.v[i]; });
    }
    // Bits of low where mask has them, of high where only all has them.
    static I merge(I high, I low, I mask, I all) {
        return each_int([&](int i) { return (low.v[i] & mask.v[i]) | (high.v[i] & all.v[i] & ~mask.v[i]); });
    }
    struct Bytes {
        std::uint8_t v[16];
    };
    static I choose_bytes(const Bytes& table, I code) {
        return each_int([&](int i) {
            std::uint32_t chosen = 0;
            for (int j = 0; j < 32; j += 8) chosen |= static_cast<std::uint32_t>(table.v[code.v[i] >> j & 15]) << j;
            return chosen;
        });
    }
    static Bytes e2m1_levels() { return {{12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0}}; }
    static I widen(const std::uint8_t* from) {
        return each_int([=](int i) { return static_cast<std::uint32_t>(from[i]); });
    }
    static I add_int(I a, I b) {
        return each_int([&](int i) { return a.v[i] + b.v[i]; });
    }
    static I sub_int(I a, I b) {
        return each_int([&](int i) { return a.v[i] - b.v[i]; });
    }
    static I mul_int(I a, I b) {
        return each_int([&](int i) { return a.v[i] * b.v[i]; });
    }
    static F to_float(I a) {
        return each([&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.v[i])); });
    }
    static F add(F a, F b) {
        return each([&](int i) { return a.v[i] + b.v[i]; });
    }
    static F numbers(const std::uint8_t* from, subnibble::Number type) {
        return each([=](int i) { return number(from, type, i); });
    }
    // Whether a WIDE `dot` costs no more than another.
    static constexpr bool wide = true;
    // Adds products of unsigned bytes of `level` and signed bytes of x, four in each lane.
    template <bool>
    static I dot(I sum, I level, I x) {
        return each_int([&](int i) {
            std::int32_t four = 0;
            for (int j = 0; j < 32; j += 8)
                four += static_cast<std::int32_t>(level.v[i] >> j & 255) * static_cast<std::int8_t>(x.v[i] >> j & 255);
            return sum.v[i] + static_cast<std::uint32_t>(four);
        });
    }
    static void round_to_int(const float* x, float factor, std::int64_t count, std::int32_t* out) {
        for (std::int64_t i = 0; i < count; ++i) out[i] = static_cast<std::int32_t>(std::nearbyint(x[i] * factor));
    }
};

}  // namespace
