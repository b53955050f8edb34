// Dense rows of a packed matrix in the checkpoint's own order, written once for every instruction set. A source file
// defines its vector type `V` in an unnamed namespace and includes this file. Everything here has internal linkage and
// calls nothing of the standard library but memcpy and memset: a function that two sources share may be linked in the
// form that only the newer processor runs.
//
// One vector of 32-bit words holds a chunk: V::lanes words of 8 codes (of 4 codes at 8 bits), in the order of the bit
// stream. Each lane takes a word, shifts it by its code's place, and the low bits choose from a table of at most 16
// floats. So a vector of weights costs a shift and a look-up, on any grid.

#include <cstring>

#include "matrix.h"
#include "numbers.h"

namespace {

using subnibble::Grid;
using subnibble::Matrix;
using subnibble::Number;
using subnibble::Plan;
using subnibble::Spread;
using F = V::F;
using I = V::I;
constexpr int L = V::lanes;

template <int BITS>
constexpr int word_codes = BITS == 8 ? 4 : 8;
template <int BITS>
constexpr int chunk_bytes = L * word_codes<BITS> * BITS / 8;

constexpr float e2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                            -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline std::uint32_t code(const std::uint8_t* stream, int bits, std::int64_t index) {
    const std::int64_t bit = index * bits;
    const std::uint32_t low = stream[bit / 8];
    const int shift = static_cast<int>(bit % 8);
    const std::uint32_t pair = shift + bits > 8 ? low | static_cast<std::uint32_t>(stream[bit / 8 + 1]) << 8 : low;
    return pair >> shift & ((1u << bits) - 1);
}

// The first `count` codes of a stream, as floats.
inline void codes_as_floats(const std::uint8_t* stream, int bits, std::int64_t count, float* out) {
    const std::int64_t bytes = (count * bits + 7) / 8;
    const std::uint64_t mask = (1u << bits) - 1;
    for (std::int64_t first = 0; first < count; first += 8) {
        // 8 codes fill `bits` bytes.
        const std::int64_t at = first / 8 * bits, left = bytes - at < bits ? bytes - at : bits;
        std::uint64_t word = 0;
        std::memcpy(&word, stream + at, static_cast<std::size_t>(left));
        const std::int64_t stop = count - first < 8 ? count - first : 8;
        for (std::int64_t i = 0; i < stop; ++i) out[first + i] = static_cast<float>(word >> i * bits & mask);
    }
}

// Scales and zero-points of one row as floats, and its codes.
struct Row {
    const std::uint8_t* codes;
    const std::uint8_t* end;
    // whole, any: (groups * planes); lanes: (groups); words: one for each word. Padded with L zeros.
    float* scales;
    float* zeros;
};

inline std::int64_t planes(const Matrix& w) { return w.grid == Grid::sign ? w.bits : 1; }

inline float middle(const Matrix& w) { return w.grid == Grid::uniform ? static_cast<float>(1 << (w.bits - 1)) : 0.0f; }

// Spread `count` floats so that word i of the row has that of its group; from the last to the first, in place.
inline void repeat_for_words(float* values, std::int64_t groups, std::int64_t words, std::int64_t group_words) {
    for (std::int64_t group = groups - 1; group >= 0; --group) {
        const float value = values[group];
        const std::int64_t stop = (group + 1) * group_words < words ? (group + 1) * group_words : words;
        for (std::int64_t word = group * group_words; word < stop; ++word) values[word] = value;
    }
}

// scratch: room for one row, plan.scratch floats in all rows of a tile.
inline Row prepare(const Matrix& w, const Plan& plan, std::int64_t row, float* scratch) {
    const std::int64_t code_bytes = (w.columns * w.bits + 7) / 8, count = plan.groups * planes(w);
    const std::int64_t words = plan.chunks * L, room = (count > words ? count : words) + 2 * L;
    Row result{w.codes + row * code_bytes, w.codes + (row + 1) * code_bytes, scratch, scratch + room};
    const std::uint8_t* scales = w.scales + row * count * number_bytes(w.scale_type);
    if (!(w.scale_type == Number::float16 && V::from_halves(scales, count, result.scales)))
        for (std::int64_t i = 0; i < count; ++i) result.scales[i] = number(scales, w.scale_type, i);
    if (w.zeros == nullptr) {
        for (std::int64_t i = 0; i < plan.groups; ++i) result.zeros[i] = middle(w);
    } else if (w.integer_zeros) {
        const std::int64_t bytes = (plan.groups * w.bits + 7) / 8;
        codes_as_floats(w.zeros + row * bytes, w.bits, plan.groups, result.zeros);
    } else {
        const std::uint8_t* zeros = w.zeros + row * plan.groups * number_bytes(w.scale_type);
        if (!(w.scale_type == Number::float16 && V::from_halves(zeros, plan.groups, result.zeros)))
            for (std::int64_t i = 0; i < plan.groups; ++i) result.zeros[i] = number(zeros, w.scale_type, i);
    }
    std::int64_t used = count, used_zeros = plan.groups;
    if (plan.spread == Spread::words) {
        const std::int64_t all = (w.columns + plan.word_codes - 1) / plan.word_codes;
        repeat_for_words(result.scales, plan.groups, all, w.group / plan.word_codes);
        repeat_for_words(result.zeros, plan.groups, all, w.group / plan.word_codes);
        used = used_zeros = all;
    }
    // Beyond the last group are inputs of zero; what multiplies them must be finite.
    const std::int64_t pad = plan.spread == Spread::words ? words - used + L : 2 * L;
    if (pad > 0) std::memset(result.scales + used, 0, static_cast<std::size_t>(pad) * 4);
    const std::int64_t pad_zeros = plan.spread == Spread::words ? words - used_zeros + L : 2 * L;
    if (pad_zeros > 0) std::memset(result.zeros + used_zeros, 0, static_cast<std::size_t>(pad_zeros) * 4);
    return result;
}

inline std::int64_t row_room(const Matrix& w, const Plan& plan) {
    const std::int64_t count = plan.groups * planes(w), words = plan.chunks * L;
    return 2 * ((count > words ? count : words) + 2 * L);
}

// Level of code j in units of the scale, zero-point not subtracted, repeated so that higher bits do not matter.
template <int BITS>
inline void levels(Grid grid, float* out) {
    for (int j = 0; j < 16; ++j) {
        const int own = j & ((1 << (BITS == 8 ? 4 : BITS)) - 1);
        out[j] = grid == Grid::mxfp4 ? e2m1[own] : static_cast<float>(own);
    }
}

// Weights of a sign grid by code: the signed scales summed from bit 0 on, in the order of the reference.
template <int BITS>
inline void sign_levels(const float* scales, float* out) {
    for (int j = 0; j < 16; ++j) {
        float sum = 0.0f;
        for (int bit = 0; bit < BITS && BITS != 8; ++bit) sum += j >> bit & 1 ? scales[bit] : -scales[bit];
        out[j] = sum;
    }
}

template <int BITS>
inline I load_words(const std::uint8_t* from, const std::uint8_t* end) {
    if (end - from >= chunk_bytes<BITS>) return V::words<BITS>(from);
    std::uint8_t bytes[chunk_bytes<BITS>] = {};
    std::memcpy(bytes, from, static_cast<std::size_t>(end - from));
    return V::words<BITS>(bytes);
}

// Where scales of chunks are found in a row.
struct Steps {
    // whole: chunks of a group; lanes, words: groups (words) of a chunk.
    std::int64_t size;
    std::int32_t pattern[L];
};

template <int BITS>
inline Steps steps_of(const Matrix& w, const Plan& plan) {
    Steps steps{};
    if (plan.spread == Spread::whole) {
        steps.size = w.group >= w.columns ? plan.chunks : w.group / plan.chunk;
    } else if (plan.spread == Spread::lanes) {
        steps.size = plan.chunk / w.group;
        for (int i = 0; i < L; ++i) steps.pattern[i] = static_cast<std::int32_t>(i * word_codes<BITS> / w.group);
    } else {
        steps.size = L;
        for (int i = 0; i < L; ++i) steps.pattern[i] = i;
    }
    return steps;
}

// Decode a row whose groups end anywhere, one code at a time.
inline void decode_row(const Matrix& w, const Row& row, float* out) {
    std::int64_t column = 0;
    for (std::int64_t group = 0; column < w.columns; ++group) {
        const std::int64_t stop = column + w.group < w.columns ? column + w.group : w.columns;
        for (; column < stop; ++column) {
            const std::uint32_t c = code(row.codes, w.bits, column);
            if (w.grid == Grid::sign) {
                float sum = 0.0f;
                for (int bit = 0; bit < w.bits; ++bit) {
                    const float scale = row.scales[group * w.bits + bit];
                    sum += c >> bit & 1 ? scale : -scale;
                }
                out[column] = sum;
            } else {
                const float level = w.grid == Grid::mxfp4 ? e2m1[c & 15] : static_cast<float>(c);
                out[column] = (level - row.zeros[group]) * row.scales[group];
            }
        }
    }
}

// Write the first `count` of `values` to column `column` of a dense row.
inline void put(void* row, Number type, std::int64_t column, const float* values, std::int64_t count) {
    if (type == Number::float32) {
        std::memcpy(static_cast<std::uint8_t*>(row) + 4 * column, values, static_cast<std::size_t>(count) * 4);
        return;
    }
    std::uint8_t* to = static_cast<std::uint8_t*>(row) + 2 * column;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::uint16_t half = to_bfloat16(values[i]);
        std::memcpy(to + 2 * i, &half, 2);
    }
}

// Weights of a row in their own order: vector t of a chunk holds columns t * L .. t * L + L - 1.
template <int BITS>
void dequantize_bits(const Matrix& w, const Plan& plan, void* out, Number type, std::int64_t out_stride,
                     std::int64_t first, std::int64_t last, float* scratch) {
    constexpr int U = word_codes<BITS>;
    const Steps steps = steps_of<BITS>(w, plan);
    const bool whole = plan.spread == Spread::whole, sign = w.grid == Grid::sign;
    alignas(64) float base[16];
    levels<BITS>(w.grid, base);
    std::int32_t shifts[L], of_word[U][L];
    for (int i = 0; i < L; ++i) shifts[i] = i % U * BITS;
    for (int t = 0; t < U; ++t)
        for (int i = 0; i < L; ++i) of_word[t][i] = (t * L + i) / U;
    const I shift = V::load_int(shifts), pattern = V::load_int(steps.pattern);
    for (std::int64_t r = first; r < last; ++r) {
        const Row row = prepare(w, plan, r, scratch);
        void* to = static_cast<std::uint8_t*>(out) + (r - first) * out_stride * number_bytes(type);
        auto table = V::template table<BITS>(V::template levels<BITS>(base), V::zero());
        for (std::int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
            const std::int64_t start = chunk * plan.chunk, at = whole ? chunk / steps.size : chunk * steps.size;
            const I words = load_words<BITS>(row.codes + chunk * chunk_bytes<BITS>, row.end);
            F scale = V::broadcast(1.0f), zero = V::zero();
            if (sign) {
                alignas(64) float signs[16];
                sign_levels<BITS>(row.scales + at * BITS, signs);
                table = V::template table<BITS>(V::template levels<BITS>(signs), V::zero());
            } else {
                scale = whole ? V::broadcast(row.scales[at]) : V::choose(row.scales + at, pattern);
                zero = whole ? V::broadcast(row.zeros[at]) : V::choose(row.zeros + at, pattern);
            }
            for (int t = 0; t < U && start + t * L < w.columns; ++t) {
                const I lane = V::load_int(of_word[t]);
                const I codes = V::shift_right(V::permute(words, lane), shift);
                const F level = V::template look_up<BITS>(table, codes);
                F weight = level;
                if (whole && !sign) weight = V::mul(V::sub(level, zero), scale);
                if (!whole) weight = V::mul(V::sub(level, V::permute(zero, lane)), V::permute(scale, lane));
                const std::int64_t column = start + t * L, left = w.columns - column;
                if (left >= L && type == Number::float32) {
                    V::store(static_cast<float*>(to) + column, weight);
                } else {
                    alignas(64) float values[L];
                    V::store(values, weight);
                    put(to, type, column, values, left < L ? left : L);
                }
            }
        }
    }
}

void dequantize_any(const Matrix& w, const Plan& plan, void* out, Number type, std::int64_t out_stride,
                    std::int64_t first, std::int64_t last, float* scratch) {
    float* decoded = scratch + row_room(w, plan);
    for (std::int64_t r = first; r < last; ++r) {
        decode_row(w, prepare(w, plan, r, scratch), decoded);
        put(static_cast<std::uint8_t*>(out) + (r - first) * out_stride * number_bytes(type), type, 0, decoded,
            w.columns);
    }
}

void dequantize(const Matrix& w, const Plan& plan, void* out, Number type, std::int64_t out_stride, std::int64_t first,
                std::int64_t last, float* scratch) {
    auto* run = plan.spread == Spread::any ? dequantize_any
                : w.bits == 2              ? dequantize_bits<2>
                : w.bits == 3              ? dequantize_bits<3>
                : w.bits == 4              ? dequantize_bits<4>
                                           : dequantize_bits<8>;
    run(w, plan, out, type, out_stride, first, last, scratch);
}

}  // namespace
