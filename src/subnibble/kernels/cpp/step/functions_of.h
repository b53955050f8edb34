// `StepFunctions` for the instruction set that the including source is compiled for; internal linkage only.
#include <algorithm>
#include <cmath>

#include "step/functions.h"
#include "step/wide.h"

namespace {

namespace step {

using namespace wide;
using subnibble::Axis;
using subnibble::Dtype;
using subnibble::Gate;
using subnibble::KeyForm;
using subnibble::kTokens;
using subnibble::padded;
using subnibble::ValueForm;

// Rows whose sums fit the registers, beside two or four vectors for each.
constexpr int kScoreRows = kLanes == 16 ? 8 : 2, kWeighRows = kLanes == 16 ? 4 : 1;

// ---- norms, gates ----

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

// ---- dense matrices ----

template <Dtype TYPE>
SUBNIBBLE_INLINE F numbers(const void* from, std::int64_t index) {
    if constexpr (TYPE == Dtype::float32) return load(static_cast<const float*>(from) + index);
    if constexpr (TYPE == Dtype::bfloat16) return load_bfloats(static_cast<const std::uint16_t*>(from) + index);
    return load_halves(static_cast<const std::uint16_t*>(from) + index);
}

inline float number(const void* from, Dtype type, std::int64_t index) {
    if (type == Dtype::float32) return static_cast<const float*>(from)[index];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(from)[index];
    if (type == Dtype::float16) return subnibble::from_half(bits);
    const std::uint32_t word = std::uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

template <Dtype TYPE, int T>
void dense_rows(const void* rows, std::int64_t columns, const float* x, std::int64_t x_stride, std::int64_t first,
                std::int64_t last, float* y, std::int64_t y_stride) {
    constexpr int R = 2;
    for (std::int64_t r = first; r < last; r += R) {
        const int here = static_cast<int>(std::min<std::int64_t>(R, last - r));
        F total[R][T];
        for (auto& row : total)
            for (F& one : row) one = broadcast(0);
        std::int64_t i = 0;
        for (; i + kWide <= columns; i += kWide) {
            F w[R];
#pragma GCC unroll 8
            for (int k = 0; k < R; ++k) w[k] = numbers<TYPE>(rows, (r + (k < here ? k : 0)) * columns + i);
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const F of_x = load(x + t * x_stride + i);
#pragma GCC unroll 8
                for (int k = 0; k < R; ++k) total[k][t] = total[k][t] + w[k] * of_x;
            }
        }
        for (int k = 0; k < here; ++k)
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                float all = sum(total[k][t]);
                for (std::int64_t j = i; j < columns; ++j)
                    all += number(rows, TYPE, (r + k) * columns + j) * x[t * x_stride + j];
                y[t * y_stride + r + k] = all;
            }
    }
}

template <Dtype TYPE>
void dense_of(const void* rows, std::int64_t columns, const float* x, std::int64_t x_stride, std::int64_t tokens,
              std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride) {
    // Rows that stay in the cache while all tokens pass.
    constexpr std::int64_t kRows = 32;
    for (std::int64_t from = first; from < last; from += kRows) {
        const std::int64_t to = std::min(last, from + kRows);
        std::int64_t t = 0;
        for (; t + 4 <= tokens; t += 4)
            dense_rows<TYPE, 4>(rows, columns, x + t * x_stride, x_stride, from, to, y + t * y_stride, y_stride);
        for (; t < tokens; ++t)
            dense_rows<TYPE, 1>(rows, columns, x + t * x_stride, x_stride, from, to, y + t * y_stride, y_stride);
    }
}

void dense(const void* rows, Dtype type, std::int64_t columns, const float* x, std::int64_t x_stride,
           std::int64_t tokens, std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride) {
    auto* run = type == Dtype::float32    ? dense_of<Dtype::float32>
                : type == Dtype::bfloat16 ? dense_of<Dtype::bfloat16>
                                          : dense_of<Dtype::float16>;
    run(rows, columns, x, x_stride, tokens, first, last, y, y_stride);
}

// ---- keys ----

// Codes of a channel, of 32 tokens.
template <int BITS>
SUBNIBBLE_INLINE void key_codes(const std::uint8_t* codes, std::int64_t width, std::int64_t d, F (&out)[2]) {
    if constexpr (BITS == 8) {
        out[0] = to_float(load_bytes(codes + 32 * d));
        out[1] = to_float(load_bytes(codes + 32 * d + 16));
    } else if constexpr (BITS == 4) {
        const I both = load_bytes(codes + 16 * d);
        out[0] = to_float(both & 15);
        out[1] = to_float(right<4>(both));
    } else {
        const I four = load_bytes(codes + 16 * (d / 2));
        const I both = d % 2 == 0 ? four : right<4>(four);
        I first = both & 3, second = right<2>(both) & 3;
        if constexpr (BITS == 3) {
            std::uint16_t high[2];
            std::memcpy(high, codes + 16 * ((width + 1) / 2) + 4 * d, 4);
            first = first | left<2>(spread_bits(high[0]));
            second = second | left<2>(spread_bits(high[1]));
        }
        out[0] = to_float(first);
        out[1] = to_float(second);
    }
}

// Call `take(d, keys of 32 tokens)` for each channel of a tile.
template <int BITS, typename Take>
SUBNIBBLE_INLINE void each_channel(const KeyForm& form, const std::uint8_t* tile, const float* center, Take take) {
    const auto finished = [&](std::int64_t d, F(&key)[2]) __attribute__((always_inline)) {
        if (center != nullptr)
            for (F& half : key) half = half + broadcast(center[d]);
        take(d, key);
    };
    if constexpr (BITS == subnibble::kExact) {
        const auto* halves = reinterpret_cast<const std::uint16_t*>(tile);
        for (std::int64_t d = 0; d < form.width; ++d) {
            F key[2] = {load_halves(halves + 32 * d), load_halves(halves + 32 * d + 16)};
            take(d, key);
        }
    } else {
        const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at());
        const std::uint16_t* lows = scales + form.scales();
        if (form.axis == Axis::token) {
            const std::int64_t groups = form.groups();
            for (std::int64_t g = 0; g < groups; ++g) {
                const F scale[2] = {load_halves(scales + 32 * g), load_halves(scales + 32 * g + 16)};
                const F low[2] = {load_halves(lows + 32 * g), load_halves(lows + 32 * g + 16)};
                const std::int64_t stop = std::min(form.width, (g + 1) * form.group);
                for (std::int64_t d = g * form.group; d < stop; ++d) {
                    F code[2];
                    key_codes<BITS>(tile, form.width, d, code);
                    F key[2] = {low[0] + scale[0] * code[0], low[1] + scale[1] * code[1]};
                    finished(d, key);
                }
            }
        } else if (form.by_halves()) {
            const std::int64_t room = padded(form.width, 16);
            for (std::int64_t from = 0; from < form.width; from += 16) {
                float of_half[4][16];
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h) {
                    store(of_half[h], load_halves(scales + h * room + from));
                    store(of_half[2 + h], load_halves(lows + h * room + from));
                }
                for (std::int64_t d = from; d < std::min(form.width, from + 16); ++d) {
                    F code[2], key[2];
                    key_codes<BITS>(tile, form.width, d, code);
#pragma GCC unroll 2
                    for (int h = 0; h < 2; ++h)
                        key[h] = broadcast(of_half[2 + h][d - from]) + broadcast(of_half[h][d - from]) * code[h];
                    finished(d, key);
                }
            }
        } else {
            for (std::int64_t d = 0; d < form.width; ++d) {
                F code[2], key[2];
                key_codes<BITS>(tile, form.width, d, code);
#pragma GCC unroll 2
                for (int h = 0; h < 2; ++h)
                    key[h] = load_halves(lows + 32 * d + 16 * h) + load_halves(scales + 32 * d + 16 * h) * code[h];
                finished(d, key);
            }
        }
    }
}

template <int R>
struct Scores {
    F sum[R][2];

    SUBNIBBLE_INLINE Scores() {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = broadcast(0);
    }
    SUBNIBBLE_INLINE void take(const float* q, std::int64_t q_stride, std::int64_t d, const F (&key)[2]) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F x = broadcast(q[r * q_stride + d]);
            sum[r][0] = sum[r][0] + x * key[0];
            sum[r][1] = sum[r][1] + x * key[1];
        }
    }
    SUBNIBBLE_INLINE void write(float* out, std::int64_t out_stride) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) store(out + r * out_stride + 16 * h, sum[r][h]);
    }
};

// Call `run(number of rows as a constant, first row)` until all rows are done.
template <int MOST, typename Run>
SUBNIBBLE_INLINE void each_rows(std::int64_t rows, Run run) {
    std::int64_t r = 0;
    for (; rows - r >= MOST; r += MOST) run(std::integral_constant<int, MOST>{}, r);
    switch (rows - r) {
        case 7: if constexpr (MOST > 7) run(std::integral_constant<int, 7>{}, r); break;
        case 6: if constexpr (MOST > 6) run(std::integral_constant<int, 6>{}, r); break;
        case 5: if constexpr (MOST > 5) run(std::integral_constant<int, 5>{}, r); break;
        case 4: if constexpr (MOST > 4) run(std::integral_constant<int, 4>{}, r); break;
        case 3: if constexpr (MOST > 3) run(std::integral_constant<int, 3>{}, r); break;
        case 2: if constexpr (MOST > 2) run(std::integral_constant<int, 2>{}, r); break;
        case 1: if constexpr (MOST > 1) run(std::integral_constant<int, 1>{}, r); break;
        default: break;
    }
}

template <int BITS>
void key_scores_of(const KeyForm& form, const std::uint8_t* tile, const float* center, const float* q,
                   std::int64_t rows, std::int64_t q_stride, float* out, std::int64_t out_stride) {
    each_rows<kScoreRows>(rows, [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        Scores<decltype(count)::value> scores;
        const float* of_rows = q + first * q_stride;
        each_channel<BITS>(form, tile, center, [&](std::int64_t d, const F(&key)[2]) __attribute__((always_inline)) {
            scores.take(of_rows, q_stride, d, key);
        });
        scores.write(out + first * out_stride, out_stride);
    });
}

void key_scores(const KeyForm& form, const std::uint8_t* tile, const float* center, const float* q, std::int64_t rows,
                std::int64_t q_stride, float* out, std::int64_t out_stride) {
    auto* run = form.bits == 2   ? key_scores_of<2>
                : form.bits == 3 ? key_scores_of<3>
                : form.bits == 4 ? key_scores_of<4>
                : form.bits == 8 ? key_scores_of<8>
                                 : key_scores_of<subnibble::kExact>;
    run(form, tile, center, q, rows, q_stride, out, out_stride);
}

template <int BITS>
void keys_of(const KeyForm& form, const std::uint8_t* tile, const float* center, float* out) {
    each_channel<BITS>(form, tile, center, [&](std::int64_t d, const F(&key)[2]) __attribute__((always_inline)) {
        store(out + 32 * d, key[0]);
        store(out + 32 * d + 16, key[1]);
    });
}

void keys(const KeyForm& form, const std::uint8_t* tile, const float* center, float* out) {
    auto* run = form.bits == 2   ? keys_of<2>
                : form.bits == 3 ? keys_of<3>
                : form.bits == 4 ? keys_of<4>
                : form.bits == 8 ? keys_of<8>
                                 : keys_of<subnibble::kExact>;
    run(form, tile, center, out);
}

void scores(const float* dense_keys, std::int64_t width, const float* q, std::int64_t rows, std::int64_t q_stride,
            float* out, std::int64_t out_stride) {
    each_rows<kScoreRows>(rows, [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        Scores<decltype(count)::value> all;
        for (std::int64_t d = 0; d < width; ++d) {
            const F key[2] = {load(dense_keys + 32 * d), load(dense_keys + 32 * d + 16)};
            all.take(q + first * q_stride, q_stride, d, key);
        }
        all.write(out + first * out_stride, out_stride);
    });
}

// ---- values ----

// Codes of vector n of a token's four; four: where their codes begin, high: their high bits (3 bits only).
template <int BITS, int N>
SUBNIBBLE_INLINE F value_codes(const std::uint8_t* four, const std::uint8_t* high) {
    if constexpr (BITS == 8) {
        return to_float(load_bytes(four + 16 * N));
    } else if constexpr (BITS == 4) {
        const I both = load_bytes(four + 16 * (N / 2));
        return to_float(N % 2 == 0 ? both & 15 : right<4>(both));
    } else {
        I code = right<2 * N>(load_bytes(four)) & 3;
        if constexpr (BITS == 3) {
            std::uint16_t bits;
            std::memcpy(&bits, high + 2 * N, 2);
            code = code | left<2>(spread_bits(bits));
        }
        return to_float(code);
    }
}

// Scales and lowest values of a tile of values, as float32.
struct ValueScales {
    // Groups that fit.
    static constexpr std::int64_t kRoom = 8;
    float scale[kTokens * kRoom], low[kTokens * kRoom];

    SUBNIBBLE_INLINE ValueScales(const ValueForm& form, const std::uint8_t* tile) {
        const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at());
        for (std::int64_t i = 0; i < form.scales(); i += 16) {
            store(scale + i, load_halves(scales + i));
            store(low + i, load_halves(scales + form.scales() + i));
        }
    }
};

// Whether vectors lie in one group each, and there are few groups.
inline bool by_vectors(const ValueForm& form) {
    return form.exact() || ((form.group % 16 == 0 || form.group >= form.width) && form.groups() <= ValueScales::kRoom);
}

// Vectors first .. first + COUNT - 1 of a tile's tokens; first is a multiple of four.
template <int BITS, int COUNT>
struct CodedVectors {
    const std::uint8_t *four, *high;
    std::int64_t row_bytes, groups;
    const float *scale[COUNT], *low[COUNT];

    SUBNIBBLE_INLINE CodedVectors(const ValueForm& form, const std::uint8_t* tile, const ValueScales& scales,
                                  std::int64_t first)
        : four(tile + (BITS == subnibble::kExact ? 32 * first : 2 * BITS * first)),
          high(tile + 16 * ((form.vectors() + 3) / 4) + 2 * first), row_bytes(form.row_bytes()), groups(form.groups()) {
        // Of 3 bits, the low two are stored like 2 bits.
        if constexpr (BITS == 3) four = tile + 4 * first;
        for (int n = 0; n < COUNT; ++n) {
            const std::int64_t group = form.exact() ? 0 : 16 * (first + n) / form.group;
            scale[n] = scales.scale + group, low[n] = scales.low + group;
        }
    }
    template <int N>
    SUBNIBBLE_INLINE F at(std::int64_t j) const {
        if constexpr (BITS == subnibble::kExact) {
            return load_halves(reinterpret_cast<const std::uint16_t*>(four + j * row_bytes) + 16 * N);
        } else {
            const F code = value_codes<BITS, N>(four + j * row_bytes, high + j * row_bytes);
            return broadcast(low[N][j * groups]) + broadcast(scale[N][j * groups]) * code;
        }
    }
};

// The same of values in float32.
template <int COUNT>
struct FloatVectors {
    const float* values;
    std::int64_t width;

    template <int N>
    SUBNIBBLE_INLINE F at(std::int64_t j) const {
        return load(values + j * width + 16 * N);
    }
};

template <int COUNT, typename Function, int... N>
SUBNIBBLE_INLINE void each_vector(Function function, std::integer_sequence<int, N...>) {
    (function(std::integral_constant<int, N>{}), ...);
}

// Sums of COUNT vectors for R rows; out: their first numbers.
template <int R, int COUNT, typename Vectors>
SUBNIBBLE_INLINE void weigh_vectors(const Vectors& vectors, std::int64_t tokens, const float* p, std::int64_t p_stride,
                                    float* out, std::int64_t out_stride) {
    constexpr auto numbers = std::make_integer_sequence<int, COUNT>{};
    F total[R][COUNT];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < COUNT; ++n) total[r][n] = load(out + r * out_stride + 16 * n);
    for (std::int64_t j = 0; j < tokens; ++j) {
        F v[COUNT];
        each_vector<COUNT>([&](auto n) __attribute__((always_inline)) { v[n] = vectors.template at<n>(j); }, numbers);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const F weight = broadcast(p[r * p_stride + j]);
#pragma GCC unroll 4
            for (int n = 0; n < COUNT; ++n) total[r][n] = total[r][n] + weight * v[n];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int n = 0; n < COUNT; ++n) store(out + r * out_stride + 16 * n, total[r][n]);
}

// Call `run(vectors as a constant, first vector)`, four at a time.
template <typename Run>
SUBNIBBLE_INLINE void each_four(std::int64_t vectors, Run run) {
    std::int64_t first = 0;
    for (; first + 4 <= vectors; first += 4) run(std::integral_constant<int, 4>{}, first);
    switch (vectors - first) {
        case 3: run(std::integral_constant<int, 3>{}, first); break;
        case 2: run(std::integral_constant<int, 2>{}, first); break;
        case 1: run(std::integral_constant<int, 1>{}, first); break;
        default: break;
    }
}

void weigh_floats(const float* dense_values, std::int64_t width, std::int64_t tokens, const float* p,
                  std::int64_t rows, std::int64_t p_stride, float* out, std::int64_t out_stride) {
    const std::int64_t room = padded(width, 16);
    each_four(room / 16, [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        constexpr int COUNT = decltype(count)::value;
        const FloatVectors<COUNT> vectors{dense_values + 16 * first, room};
        each_rows<kWeighRows>(rows, [&](auto some, std::int64_t row) __attribute__((always_inline)) {
            weigh_vectors<decltype(some)::value, COUNT>(vectors, tokens, p + row * p_stride, p_stride,
                                                        out + row * out_stride + 16 * first, out_stride);
        });
    });
}

// Of tiles whose vectors lie in one group each.
template <int BITS>
void weigh_of(const ValueForm& form, const std::uint8_t* tile, std::int64_t tokens, const float* p, std::int64_t rows,
              std::int64_t p_stride, float* out, std::int64_t out_stride) {
    const ValueScales scales(form, tile);
    each_four(form.vectors(), [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        constexpr int COUNT = decltype(count)::value;
        const CodedVectors<BITS, COUNT> vectors(form, tile, scales, first);
        each_rows<kWeighRows>(rows, [&](auto some, std::int64_t row) __attribute__((always_inline)) {
            weigh_vectors<decltype(some)::value, COUNT>(vectors, tokens, p + row * p_stride, p_stride,
                                                        out + row * out_stride + 16 * first, out_stride);
        });
    });
}

template <int BITS>
void aligned_values_of(const ValueForm& form, const std::uint8_t* tile, float* out) {
    const ValueScales scales(form, tile);
    const std::int64_t room = 16 * form.vectors();
    each_four(form.vectors(), [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        constexpr int COUNT = decltype(count)::value;
        const CodedVectors<BITS, COUNT> vectors(form, tile, scales, first);
        for (std::int64_t j = 0; j < kTokens; ++j)
            each_vector<COUNT>(
                [&](auto n) __attribute__((always_inline)) {
                    store(out + j * room + 16 * (first + n), vectors.template at<n>(j));
                },
                std::make_integer_sequence<int, COUNT>{});
    });
}

// Of groups that end within a vector.
template <int BITS>
void values_of(const ValueForm& form, const std::uint8_t* tile, float* out) {
    const std::int64_t room = 16 * form.vectors();
    const auto* scales = reinterpret_cast<const std::uint16_t*>(tile + form.scales_at());
    each_four(form.vectors(), [&](auto count, std::int64_t first) __attribute__((always_inline)) {
        constexpr int COUNT = decltype(count)::value;
        const std::uint8_t* four = tile + (BITS == 3 ? 4 : 2 * BITS) * first;
        const std::uint8_t* high = tile + 16 * ((form.vectors() + 3) / 4) + 2 * first;
        for (std::int64_t j = 0; j < kTokens; ++j)
            each_vector<COUNT>(
                [&](auto n) __attribute__((always_inline)) {
                    float* to = out + j * room + 16 * (first + n);
                    store(to, value_codes<BITS, n>(four + j * form.row_bytes(), high + j * form.row_bytes()));
                },
                std::make_integer_sequence<int, COUNT>{});
    });
    for (std::int64_t j = 0; j < kTokens; ++j)
        for (std::int64_t d = 0; d < room; ++d) {
            const std::int64_t at = j * form.groups() + std::min(d, form.width - 1) / form.group;
            float& value = out[j * room + d];
            value = subnibble::from_half(scales[form.scales() + at]) + subnibble::from_half(scales[at]) * value;
        }
}

void values(const ValueForm& form, const std::uint8_t* tile, float* out) {
    const bool aligned = by_vectors(form);
    auto* run = form.exact()     ? aligned_values_of<subnibble::kExact>
                : form.bits == 2 ? (aligned ? aligned_values_of<2> : values_of<2>)
                : form.bits == 3 ? (aligned ? aligned_values_of<3> : values_of<3>)
                : form.bits == 4 ? (aligned ? aligned_values_of<4> : values_of<4>)
                                 : (aligned ? aligned_values_of<8> : values_of<8>);
    run(form, tile, out);
}

void weigh(const ValueForm& form, const std::uint8_t* tile, std::int64_t tokens, const float* p, std::int64_t rows,
           std::int64_t p_stride, float* out, std::int64_t out_stride) {
    if (!by_vectors(form)) {
        alignas(64) float dense_values[kTokens * 256];
        values(form, tile, dense_values);
        return weigh_floats(dense_values, form.width, tokens, p, rows, p_stride, out, out_stride);
    }
    auto* run = form.bits == 2   ? weigh_of<2>
                : form.bits == 3 ? weigh_of<3>
                : form.bits == 4 ? weigh_of<4>
                : form.bits == 8 ? weigh_of<8>
                                 : weigh_of<subnibble::kExact>;
    run(form, tile, tokens, p, rows, p_stride, out, out_stride);
}

// ---- probabilities ----

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

#define SUBNIBBLE_STEP_FUNCTIONS(name)                                                                               \
    const StepFunctions name{#name,           step::norm, step::gate,   step::add,   step::factor, step::dense,       \
                             step::key_scores, step::keys, step::scores, step::weigh, step::values, step::weigh_floats, \
                             step::exponentials, step::scale}
