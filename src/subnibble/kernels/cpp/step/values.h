// Values of a tile (kv_form.h), and their weighted sums. Internal linkage only, see functions_of.h.
#pragma once

#include <algorithm>
#include <utility>

#include "step/rows.h"

namespace {

namespace step {

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
            value = from_half(scales[form.scales() + at]) + from_half(scales[at]) * value;
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

}  // namespace step

}  // namespace
