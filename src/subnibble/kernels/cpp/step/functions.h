// The functions of a decoder step that run on vectors: one table for each instruction set.
#pragma once

#include <cstdint>
#include <string>

#include "matrix.h"
#include "step/kv_form.h"

namespace subnibble {

// Memory that is read next: it is fetched into the cache while codes are multiplied. Tiles at 16 bits are as large as
// a page: fetching them makes the processor wait for memory more, not less. from: null for none.
struct Next {
    const std::uint8_t* from = nullptr;
    std::int64_t tile_bytes = 0;

    // Fetch part `part` of `parts` of as many tiles. Always inline: GCC finds that a function of its own has no effect.
    inline __attribute__((always_inline)) void fetch(std::int64_t tiles, std::int64_t part, std::int64_t parts) const {
        if (from == nullptr) return;
        const std::int64_t lines = tiles * tile_bytes / 64;
        for (std::int64_t line = lines * part / parts; line < lines * (part + 1) / parts; ++line)
            __builtin_prefetch(from + 64 * line);
    }
};

enum class Gate : int { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

struct StepFunctions {
    const char* name;

    // out = gain * x / sqrt(mean of x^2 + eps) + bias, for one token of n channels. bias: null for none.
    void (*norm)(const float* x, std::int64_t n, const float* gain, const float* bias, float eps, float* out);
    // out = act(gate) * up.
    void (*gate)(Gate act, const float* gate, const float* up, std::int64_t n, float* out);
    // y += x.
    void (*add)(float* y, const float* x, std::int64_t n);
    // y = x m for vectors of `order` numbers, `count` of them `stride` apart, numbers of one `inner` apart: one factor
    // of a Kronecker product. m: (order, order), row by row.
    void (*factor)(const float* x, const float* m, std::int64_t order, std::int64_t inner, std::int64_t count,
                   float scale, float* y);
    // y[t * y_stride + r] = x[t] . row r of a dense matrix, for rows first .. last - 1.
    void (*dense)(const void* rows, Number type, std::int64_t columns, const float* x, std::int64_t x_stride,
                  std::int64_t tokens, std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride);

    // Scores of `tiles` tiles of 32 tokens, exact or `whole`: out[r * out_stride + j] = q[r] . key j. q: padded with zeros
    // to 16. center: (width), added to coded keys; or null.
    void (*key_scores)(const KeyForm&, const std::uint8_t* tile, std::int64_t tiles, const float* center,
                       const float* q, std::int64_t rows, std::int64_t q_stride, float* out, std::int64_t out_stride,
                       Next);
    // Keys of a tile as float32: (width, 32).
    void (*keys)(const KeyForm&, const std::uint8_t* tile, const float* center, float* out);
    // As `key_scores`, of one tile whose keys are float32, (width, 32).
    void (*scores)(const float* keys, std::int64_t width, const float* q, std::int64_t rows, std::int64_t q_stride,
                   float* out, std::int64_t out_stride);
    // out[r] += sum over `tokens` tokens of p[r * p_stride + j] * value j, in tiles that are exact or `whole`. Numbers p of
    // tokens that the last tile has beyond them are 0. out: rows of `width`, padded to 16.
    void (*weigh)(const ValueForm&, const std::uint8_t* tile, std::int64_t tokens, const float* p, std::int64_t rows,
                  std::int64_t p_stride, float* out, std::int64_t out_stride, Next);
    // Values of a tile as float32: (32, padded width).
    void (*values)(const ValueForm&, const std::uint8_t* tile, float* out);
    // As `weigh`, of one tile whose values are float32.
    void (*weigh_floats)(const float* values, std::int64_t width, std::int64_t tokens, const float* p,
                         std::int64_t rows, std::int64_t p_stride, float* out, std::int64_t out_stride);
    // s = e^(s - largest s), of n numbers, a multiple of 16; returns the sum. `most`: gets the largest s.
    float (*exponentials)(float* s, std::int64_t n, float* most);
    // y *= factor.
    void (*scale)(float* y, float factor, std::int64_t n);
};

// The functions for a kernel's instruction set.
const StepFunctions& step_functions(const std::string& kernel);

}  // namespace subnibble
