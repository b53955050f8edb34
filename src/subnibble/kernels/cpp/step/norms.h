// Norms, gates, factors of a Hadamard matrix, probabilities. Internal linkage only, see functions_of.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "step/rows.h"

namespace {

namespace step {

void norm(const float* x, std::int64_t n, const float* gain, const float* bias, float eps, float* out) {
    F squares = broadcast(0);
    std::int64_t i = 0;
    for (; i + kWide <= n; i += kWide) squares = squares + load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; ++i) total += x[i] * x[i];
    const float factor = 1.0f / std::sqrt(total / static_cast<float>(n) + eps);
    for (i = 0; i + kWide <= n; i += kWide) {
        const F y = load(gain + i) * (load(x + i) * broadcast(factor));
        store(out + i, bias == nullptr ? y : y + load(bias + i));
    }
    for (; i < n; ++i) out[i] = gain[i] * (x[i] * factor) + (bias == nullptr ? 0.0f : bias[i]);
}

SUBNIBBLE_INLINE F sigmoid(const F& x) {
    // e^-|x| cannot overflow.
    const F zero = broadcast(0), one = broadcast(1), small = exp(zero - max(x, zero - x));
    const F upper = one / (one + small), lower = small / (one + small);
    F out;
    for (int i = 0; i < kParts; ++i) out.part[i] = x.part[i] > 0 ? upper.part[i] : lower.part[i];
    return out;
}

SUBNIBBLE_INLINE F activated(Gate act, const F& x) {
    if (act == Gate::silu) return x * sigmoid(x);
    if (act == Gate::relu) return max(x, broadcast(0));
    if (act == Gate::gelu_tanh) {
        // 1/2 (1 + tanh z) = sigmoid(2 z).
        const F z = broadcast(1.5957691216f) * (x + broadcast(0.044715f) * x * x * x);
        return x * sigmoid(z);
    }
    F out;
    for (int i = 0; i < kParts; ++i)
        for (int l = 0; l < kLanes; ++l) {
            const float v = x.part[i][l];
            out.part[i][l] = 0.5f * v * (1.0f + std::erf(v * 0.70710678f));
        }
    return out;
}

void gate(Gate act, const float* gated, const float* up, std::int64_t n, float* out) {
    std::int64_t i = 0;
    for (; i + kWide <= n; i += kWide) store(out + i, activated(act, load(gated + i)) * load(up + i));
    if (i == n) return;
    float rest[3][kWide] = {};
    std::copy(gated + i, gated + n, rest[0]);
    std::copy(up + i, up + n, rest[1]);
    store(rest[2], activated(act, load(rest[0])) * load(rest[1]));
    std::copy(rest[2], rest[2] + (n - i), out + i);
}

void add(float* y, const float* x, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) y[i] += x[i];
}

void scale(float* y, float factor, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) y[i] *= factor;
}

void factor(const float* x, const float* m, std::int64_t order, std::int64_t inner, std::int64_t count, float scale,
            float* y) {
    if (inner == 1) {
        std::fill(y, y + count * order, 0.0f);
        for (std::int64_t c = 0; c < count; ++c)
            for (std::int64_t i = 0; i < order; ++i) {
                const float weight = x[c * order + i] * scale;
                for (std::int64_t j = 0; j < order; ++j) y[c * order + j] += weight * m[i * order + j];
            }
        return;
    }
    for (std::int64_t c = 0; c < count; ++c)
        for (std::int64_t j = 0; j < order; ++j) {
            const float* from = x + c * order * inner;
            float* to = y + (c * order + j) * inner;
            std::fill(to, to + inner, 0.0f);
            for (std::int64_t i = 0; i < order; ++i) {
                const float weight = m[i * order + j] * scale;
                for (std::int64_t k = 0; k < inner; ++k) to[k] += from[i * inner + k] * weight;
            }
        }
}


float exponentials(float* s, std::int64_t n, float* most) {
    F top = load(s);
    for (std::int64_t i = 16; i < n; i += 16) top = max(top, load(s + i));
    *most = largest(top);
    // Where no token is seen, all are minus infinity: probabilities are 0.
    const F base = broadcast(*most < -3.0e38f ? 0.0f : *most);
    F total = broadcast(0);
    for (std::int64_t i = 0; i < n; i += 16) {
        const F e = exp(load(s + i) - base);
        store(s + i, e);
        total = total + e;
    }
    return sum(total);
}

}  // namespace step

}  // namespace
