// Plain C++, right on every processor.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct V {
    static constexpr int lanes = 8, rows = 1;
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
    static F load(const float* from) {
        return each([=](int i) { return from[i]; });
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
    static F fma(F a, F b, F c) {
        return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
    }
    static float reduce(F a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
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
    static I next(I a) {
        for (int i = 0; i < 8; ++i) a.v[i] >>= BITS;
        return a;
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
};

}  // namespace

#include "rows.h"

namespace subnibble {
const Kernel portable{"portable", L, multiply, dequantize};
}
