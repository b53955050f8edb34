#include "dispatch.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace subnibble {

namespace {

// Fewer weights than this (times tokens) are not worth waking another thread.
constexpr std::int64_t kSerialWork = 1 << 16;
// Bytes.
constexpr std::int64_t kAlign = 64;

struct Free {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{kAlign}); }
};
using Floats = std::unique_ptr<float[], Free>;

Floats floats(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(float);
    return Floats(static_cast<float*>(::operator new[](bytes, std::align_val_t{kAlign})));
}

const Kernel* const kKernels[] = {
#if defined(SUBNIBBLE_X86)
    &avx512,
    &avx2,
#endif
    &portable,
};

bool runs(const Kernel& kernel) {
    const std::string name = kernel.name;
#if defined(SUBNIBBLE_X86)
    if (name == "avx512")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
    if (name == "avx2")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return name == "portable";
}

Plan plan_of(const Kernel& kernel, const Matrix& w) {
    Plan plan{};
    const std::int64_t lanes = kernel.lanes;
    plan.word_codes = w.bits == 8 ? 4 : 8;
    plan.chunk = lanes * plan.word_codes;
    plan.chunks = (w.columns + plan.chunk - 1) / plan.chunk;
    plan.groups = (w.columns + w.group - 1) / w.group;
    const bool sign = w.grid == Grid::sign;
    if (w.group >= w.columns || w.group % plan.chunk == 0)
        plan.spread = Spread::whole;
    else if (!sign && w.group % plan.word_codes == 0)
        plan.spread = plan.chunk % w.group == 0 ? Spread::lanes : Spread::words;
    else
        plan.spread = Spread::any;
    plan.token = plan.chunks * plan.chunk;
    const std::int64_t numbers = plan.groups * (sign ? w.bits : 1), words = plan.chunks * lanes;
    // Scales and zero-points of the largest tile's rows, and one dense row.
    plan.scratch = 4 * 2 * (std::max(numbers, words) + 2 * lanes) + plan.token;
    return plan;
}

float number(const std::uint8_t* from, Number type, std::int64_t index) {
    float value;
    if (type == Number::float32) {
        std::memcpy(&value, from + 4 * index, 4);
        return value;
    }
    std::uint16_t half;
    std::memcpy(&half, from + 2 * index, 2);
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Write one token as floats in the kernel's order, with zeros beyond its last column.
void arrange(const Plan& plan, int lanes, const std::uint8_t* x, Number type, std::int64_t columns, float* out) {
    if (plan.spread == Spread::any) {
        for (std::int64_t i = 0; i < plan.token; ++i) out[i] = i < columns ? number(x, type, i) : 0.0f;
        return;
    }
    const int step = plan.word_codes;
    for (std::int64_t start = 0; start < plan.token; start += plan.chunk) {
        const std::int64_t count = std::min(plan.chunk, columns - start);
        if (count < plan.chunk) std::fill(out + start, out + start + plan.chunk, 0.0f);
        for (std::int64_t j = 0; j < count; ++j)
            out[start + j % step * lanes + j / step] = number(x, type, start + j);
    }
}

// Run `work(first, last, scratch)` on parts of rows first .. last - 1, in parallel if `amount` of work is worth it.
template <typename Work>
void share_rows(std::int64_t first, std::int64_t last, std::int64_t amount, std::int64_t scratch, Work work) {
    [[maybe_unused]] const bool parallel = amount > kSerialWork;
#if defined(_OPENMP)
#pragma omp parallel if (parallel)
#endif
    {
#if defined(_OPENMP)
        const std::int64_t threads = omp_get_num_threads(), index = omp_get_thread_num();
#else
        const std::int64_t threads = 1, index = 0;
#endif
        // Whole tiles for each thread.
        const std::int64_t tiles = (last - first + 3) / 4, from = first + 4 * (tiles * index / threads),
                           to = std::min(last, first + 4 * (tiles * (index + 1) / threads));
        if (from < to) {
            const Floats memory = floats(scratch);
            work(from, to, memory.get());
        }
    }
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Kernel* kernel : kKernels)
        if (runs(*kernel)) names.emplace_back(kernel->name);
    return names;
}

const Kernel* find_kernel(const std::string& name) {
    for (const Kernel* kernel : kKernels)
        if (kernel->name == name && runs(*kernel)) return kernel;
    return nullptr;
}

void multiply(const Kernel& kernel, const Matrix& w, const void* x, Number x_type, std::int64_t tokens,
              std::int64_t x_stride, float* y, std::int64_t y_stride, bool add) {
    if (w.columns == 0 && !add)
        for (std::int64_t t = 0; t < tokens; ++t) std::fill(y + t * y_stride, y + t * y_stride + w.rows, 0.0f);
    if (tokens == 0 || w.rows == 0 || w.columns == 0) return;
    const Plan plan = plan_of(kernel, w);
    const Floats arranged = floats(tokens * plan.token);
    const auto* bytes = static_cast<const std::uint8_t*>(x);
    for (std::int64_t t = 0; t < tokens; ++t)
        arrange(plan, kernel.lanes, bytes + t * x_stride * (x_type == Number::float32 ? 4 : 2), x_type, w.columns,
                arranged.get() + t * plan.token);
    share_rows(0, w.rows, w.rows * w.columns * tokens, plan.scratch,
               [&](std::int64_t first, std::int64_t last, float* scratch) {
                   kernel.multiply(w, plan, arranged.get(), tokens, y, y_stride, add, first, last, scratch);
               });
}

void dequantize(const Kernel& kernel, const Matrix& w, std::int64_t first, std::int64_t last, void* out, Number type,
                std::int64_t out_stride) {
    if (first >= last || w.columns == 0) return;
    const Plan plan = plan_of(kernel, w);
    const std::int64_t row_bytes = out_stride * (type == Number::float32 ? 4 : 2);
    share_rows(first, last, (last - first) * w.columns, plan.scratch,
               [&](std::int64_t from, std::int64_t to, float* scratch) {
                   auto* rows = static_cast<std::uint8_t*>(out) + (from - first) * row_bytes;
                   kernel.dequantize(w, plan, rows, type, out_stride, from, to, scratch);
               });
}

}  // namespace subnibble
