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

// Runs of a weight's columns that lie in one of its groups and in one group of the input, from `start` on.
std::vector<Segment> segments_of(const Tiles& w, const Input& x, std::int64_t start) {
    std::vector<Segment> segments;
    const std::vector<std::int64_t>& bounds = x.bounds();
    std::int64_t column = 0;
    std::int64_t group = std::upper_bound(bounds.begin(), bounds.end(), start) - bounds.begin() - 1;
    while (column < w.columns) {
        while (bounds[static_cast<std::size_t>(group) + 1] <= start + column) ++group;
        const std::int64_t of_weight = column / w.group;
        const std::int64_t stop =
            std::min({(of_weight + 1) * w.group, w.columns, bounds[static_cast<std::size_t>(group) + 1] - start});
        const std::int64_t block = column / kBlockColumns;
        segments.push_back({block, (stop + kBlockColumns - 1) / kBlockColumns - block, column, of_weight, group});
        column = stop;
    }
    return segments;
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

void multiply(const Kernel& kernel, const Tiles& w, const Input& x, std::int64_t start, float* y, std::int64_t y_stride,
              bool add) {
    if (start < 0 || start + w.columns > x.columns())
        throw std::invalid_argument("the weight has columns beyond those of the input");
    if (w.columns == 0 && !add)
        for (std::int64_t t = 0; t < x.count(); ++t) std::fill(y + t * y_stride, y + t * y_stride + w.rows, 0.0f);
    if (x.count() == 0 || w.rows == 0 || w.columns == 0) return;
    std::vector<Segment> segments = segments_of(w, x, start);
    const auto count = static_cast<std::int64_t>(segments.size());
    const int planes = x.planes();

    Tokens tokens{x.numbers() + start, x.token_stride(), x.plane_stride(), planes, x.fixed(), x.count(),
                  x.scales(),          x.groups(),       nullptr,          nullptr,         segments.data(), count};
    // A segment's blocks must hold zeros where its columns are not. As numbers lie, this is so where it begins and ends
    // with a block, or where the input ends. Otherwise each segment gets a copy, with zeros around it.
    bool aligned_blocks = true;
    std::int64_t room = 0;
    std::vector<std::int64_t> stops;
    for (std::int64_t s = 0; s < count; ++s) {
        const std::int64_t stop = s + 1 < count ? segments[s + 1].offset : w.columns;
        stops.push_back(stop);
        aligned_blocks = aligned_blocks && segments[s].offset % kBlockColumns == 0 &&
                         (stop % kBlockColumns == 0 || (start + stop == x.columns() && start % kBlockColumns == 0));
        room += segments[s].blocks * kBlockColumns;
    }
    const auto sums = aligned<std::int32_t>(x.count() * count * planes);
    const auto float_sums = aligned<float>(x.count() * count);
    for (std::int64_t t = 0; t < x.count(); ++t)
        for (std::int64_t s = 0; s < count; ++s) {
            std::int32_t* of_segment = sums.get() + (t * count + s) * planes;
            for (int p = 0; p < planes; ++p) {
                const std::int8_t* from = tokens.numbers + p * tokens.plane_stride + t * tokens.token_stride;
                std::int32_t sum = 0;
                for (std::int64_t i = segments[s].offset; i < stops[s]; ++i) sum += from[i];
                of_segment[p] = sum;
            }
            const std::int64_t low = of_segment[0] + (planes > 1 ? 256 * std::int64_t{of_segment[1]} : 0);
            float_sums[t * count + s] = static_cast<float>(low);
        }
    tokens.sums = sums.get();
    tokens.float_sums = float_sums.get();
    Aligned<std::int8_t> arranged;
    if (!aligned_blocks) {
        arranged = aligned<std::int8_t>(planes * x.count() * room);
        std::fill(arranged.get(), arranged.get() + planes * x.count() * room, std::int8_t{0});
        std::int64_t place = 0;
        for (std::int64_t s = 0; s < count; ++s) {
            Segment& segment = segments[s];
            const std::int64_t first = segment.offset, at = place + first - segment.block * kBlockColumns;
            for (int p = 0; p < planes; ++p)
                for (std::int64_t t = 0; t < x.count(); ++t) {
                    const std::int8_t* from = tokens.numbers + p * tokens.plane_stride + t * tokens.token_stride;
                    std::copy(from + first, from + stops[s], arranged.get() + (p * x.count() + t) * room + at);
                }
            segment.offset = place;
            place += segment.blocks * kBlockColumns;
        }
        tokens.numbers = arranged.get(), tokens.token_stride = room, tokens.plane_stride = x.count() * room;
    }
    const std::int64_t panel_bytes = w.planes() * w.blocks * 8 * kVectorBytes;
    share(w.tiles, 2, w.rows * w.columns * x.count(), [&](std::int64_t first, std::int64_t last) {
        Aligned<std::uint8_t> scratch;
        if (x.count() >= kManyTokens || w.grid == Grid::sign) scratch = aligned<std::uint8_t>(2 * panel_bytes);
        kernel.product(w, tokens, y, y_stride, add, first, last, scratch.get());
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
