#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

#if defined(SUBNIBBLE_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(SUBNIBBLE_NEON) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "memory.h"

namespace subnibble {

namespace {

// Fewer products than this are not worth waking another thread.
constexpr std::int64_t kSerialWork = 1 << 17;
// From this many tokens on, codes are decoded once for all of them. Those of a sign grid always are.
constexpr std::int64_t kManyTokens = 5;

const Kernel* const kKernels[] = {
#if defined(SUBNIBBLE_NEON)
    &neon,
#endif
#if defined(SUBNIBBLE_AVX512AMX)
    &avx512amx,
#endif
#if defined(SUBNIBBLE_AVX512VNNI)
    &avx512vnni,
#endif
#if defined(SUBNIBBLE_AVX512)
    &avx512,
#endif
#if defined(SUBNIBBLE_AVXVNNI)
    &avxvnni,
#endif
#if defined(SUBNIBBLE_AVX2)
    &avx2,
#endif
    &portable,
};

#if defined(SUBNIBBLE_X86)
// GCC 12 does not know this feature by name: leaf 7, subleaf 1, EAX bit 4.
bool has_avx_vnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
#endif

#if defined(SUBNIBBLE_NEON)
bool has_dot_products() {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
    // Every Mac with an ARM processor has them.
    return true;
#endif
}
#endif

#if defined(SUBNIBBLE_X86)
// Leaf 7, EDX bits 24 (tiles) and 25 (products of bytes); Linux gives their registers to a process that asks.
bool has_amx() {
#if defined(SUBNIBBLE_EMULATE_AMX)
    return true;
#elif defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned bits = 3u << 24;
    constexpr long request_permission = 0x1023, tile_data = 18;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & bits) == bits &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

bool runs(const Kernel& kernel) {
    const std::string name = kernel.name;
#if defined(SUBNIBBLE_X86)
    const bool narrow =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool wide = narrow && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (name == "avx512amx") return wide && __builtin_cpu_supports("avx512vnni") && has_amx();
    if (name == "avx512vnni") return wide && __builtin_cpu_supports("avx512vnni");
    if (name == "avx512") return wide;
    if (name == "avxvnni") return narrow && has_avx_vnni();
    if (name == "avx2") return narrow;
#endif
#if defined(SUBNIBBLE_NEON)
    if (name == "neon") return has_dot_products();
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
    plan.columns = plan.chunks * plan.chunk;
    const std::int64_t numbers = plan.groups * (sign ? w.bits : 1), words = plan.chunks * lanes;
    // Scales and zero-points of one row, and the dense row.
    plan.scratch = 2 * (std::max(numbers, words) + 2 * lanes) + plan.columns;
    return plan;
}

// Run `work(first, last)` on parts of 0 .. count - 1, in parallel if `amount` of work is worth it. Parts begin at
// multiples of `step`.
template <typename Work>
void share(std::int64_t count, std::int64_t step, std::int64_t amount, Work work) {
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
        const std::int64_t parts = (count + step - 1) / step, from = step * (parts * index / threads),
                           to = std::min(count, step * (parts * (index + 1) / threads));
        if (from < to) work(from, to);
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

std::int64_t scratch_bytes(const Tiles& w, std::int64_t tokens) {
    const bool panels = tokens >= kManyTokens || w.grid == Grid::sign;
    return panels ? 2 * w.planes() * w.blocks * 8 * kVectorBytes : 0;
}

void multiply_tiles(const Kernel& kernel, const Tiles& w, const Operand& x, float* y, std::int64_t y_stride, bool add,
                    std::int64_t first, std::int64_t last, std::uint8_t* scratch) {
    const Tokens& tokens = x.tokens();
    if (first >= last) return;
    if (w.columns > 0)
        kernel.product(w, tokens, y, y_stride, add, first, last,
                       scratch_bytes(w, tokens.count) > 0 ? scratch : nullptr);
    else if (!add)
        for (std::int64_t t = 0; t < tokens.count; ++t)
            std::fill(y + t * y_stride + first * kTileRows, y + t * y_stride + std::min(last * kTileRows, w.rows),
                      0.0f);
}

void multiply(const Kernel& kernel, const Tiles& w, const Input& x, std::int64_t start, float* y, std::int64_t y_stride,
              bool add) {
    Operand operand(x, start, w.columns, w.group);
    if (x.count() == 0) return;
    operand.read(kernel, x);
    share(w.tiles, 2, w.rows * w.columns * x.count(), [&](std::int64_t first, std::int64_t last) {
        const std::int64_t bytes = scratch_bytes(w, x.count());
        const auto scratch = bytes > 0 ? aligned<std::uint8_t>(bytes) : nullptr;
        multiply_tiles(kernel, w, operand, y, y_stride, add, first, last, scratch.get());
    });
}

void dequantize(const Kernel& chosen, const Matrix& w, std::int64_t first, std::int64_t last, void* out, Number type,
                std::int64_t out_stride) {
    if (first >= last || w.columns == 0) return;
    const Kernel& kernel = chosen.dequantize == nullptr ? portable : chosen;
    const Plan plan = plan_of(kernel, w);
    const std::int64_t row_bytes = out_stride * (type == Number::float32 ? 4 : 2);
    share(last - first, 1, (last - first) * w.columns, [&](std::int64_t from, std::int64_t to) {
        const auto scratch = aligned<float>(plan.scratch);
        auto* rows = static_cast<std::uint8_t*>(out) + from * row_bytes;
        kernel.dequantize(w, plan, rows, type, out_stride, first + from, first + to, scratch.get());
    });
}

}  // namespace subnibble
