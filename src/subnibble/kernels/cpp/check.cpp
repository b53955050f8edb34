// kernels_check: compares every instruction set of this processor with the portable kernels, and those with the formula
// of a uniform grid, on random matrices. A page that must not be read follows each of their tensors: a read beyond the
// end stops the process. Needs no Python, for processors that only a cross compiler and an emulator reach.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dispatch.h"

using namespace subnibble;

namespace {

std::mt19937 generator(0);

std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

std::vector<std::uint8_t> random_bytes(std::int64_t count) {
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(generator());
    return bytes;
}

std::vector<std::pair<void*, std::size_t>> fences;

// Give back all that `fenced` returned.
void release() {
    for (const auto& [memory, size] : fences) munmap(memory, size);
    fences.clear();
}

// Memory that ends where a page begins that must not be read or written; kept until `release`.
template <typename T>
T* fenced(const std::vector<T>& data) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE)), bytes = data.size() * sizeof(T);
    const std::size_t size = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + size, page, PROT_NONE)) std::abort();
    fences.emplace_back(memory, size + page);
    void* start = static_cast<char*>(memory) + size - bytes;
    if (bytes) std::memcpy(start, data.data(), bytes);
    return static_cast<T*>(start);
}

// A matrix with its data: random codes, positive float32 scales (of mxfp4 powers of two, as exponents), and no
// zero-points (0), real ones (1) or integers (2).
struct Sample {
    std::vector<std::uint8_t> codes, zeros, exponents;
    std::vector<float> scales, real_zeros;
    Matrix matrix;

    Sample(std::int64_t rows, std::int64_t columns, std::int64_t group, int bits, Grid grid, int zero_kind) {
        const std::int64_t groups = up(columns, group), numbers = groups * (grid == Grid::sign ? bits : 1);
        codes = random_bytes(rows * up(columns * bits, 8));
        for (std::int64_t i = 0; i < rows * numbers; ++i) scales.push_back(uniform(0.01f, 1.0f));
        for (std::int64_t i = 0; i < rows * groups; ++i) real_zeros.push_back(uniform(0.0f, 3.0f));
        zeros = random_bytes(rows * up(groups * bits, 8));
        for (std::int64_t i = 0; i < rows * groups; ++i)
            exponents.push_back(static_cast<std::uint8_t>(120 + generator() % 8));
        const auto* zero = zero_kind == 0   ? nullptr
                           : zero_kind == 1 ? reinterpret_cast<const std::uint8_t*>(fenced(real_zeros))
                                            : fenced(zeros);
        const bool bytes = grid == Grid::mxfp4;
        matrix = {fenced(codes), bytes ? fenced(exponents) : reinterpret_cast<const std::uint8_t*>(fenced(scales)),
                  zero, rows, columns, bits, group, grid, bytes ? Number::e8m0 : Number::float32, zero_kind == 2};
    }

    // (code - zero) * scale, with a real zero-point.
    float value(std::int64_t row, std::int64_t column) const {
        const std::int64_t bit = column * matrix.bits, start = row * up(matrix.columns * matrix.bits, 8);
        const std::int64_t group = row * up(matrix.columns, matrix.group) + column / matrix.group;
        unsigned code = 0;
        for (int i = 0; i < matrix.bits; ++i)
            code |= (codes[static_cast<std::size_t>(start + (bit + i) / 8)] >> (bit + i) % 8 & 1u) << i;
        const auto index = static_cast<std::size_t>(group);
        return (static_cast<float>(code) - real_zeros[index]) * scales[index];
    }
};

std::vector<float> dense(const Kernel& kernel, const Matrix& w) {
    const std::vector<float> empty(static_cast<std::size_t>(w.rows * w.columns), NAN);
    float* out = fenced(empty);
    dequantize(kernel, w, 0, w.rows, out, Number::float32, w.columns);
    return {out, out + empty.size()};
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<float> tokens_of(const Matrix& w, std::int64_t tokens) {
    std::vector<float> x;
    for (std::int64_t i = 0; i < tokens * w.columns; ++i) x.push_back(uniform(-1.0f, 1.0f) * (i % 7 ? 1.0f : 100.0f));
    return x;
}

// Fixed-point inputs of 24 bits, and inputs of 8 bits in groups of 40, symmetric and not.
const InputScheme kSchemes[] = {
    {{Rounding::Kind::fixed, 0, 1.0f}, 128, 0, 3},
    {{Rounding::Kind::symmetric, 127, 1.0f}, 40, 0, 1},
    {{Rounding::Kind::asymmetric, 255, 1.0f}, 40, 0, 2},
};

std::vector<float> product(const Kernel& kernel, const Matrix& w, const std::vector<float>& x,
                           const InputScheme& scheme) {
    const auto tokens = static_cast<std::int64_t>(x.size()) / w.columns;
    float* y = fenced(std::vector<float>(static_cast<std::size_t>(tokens * w.rows), NAN));
    const Dense dense_x{reinterpret_cast<const std::uint8_t*>(fenced(x)), Number::float32, tokens, w.columns, w.columns};
    multiply(kernel, Repacked(w).tiles(), Input(kernel, dense_x, scheme), 0, y, w.rows, false);
    return {y, y + tokens * w.rows};
}

// Whether the product of fixed-point inputs is that in double, within rounding of terms that cancel in a weight, too.
bool near(const Kernel& kernel, const Matrix& w, const std::vector<float>& values, std::int64_t tokens) {
    const std::vector<float> x = tokens_of(w, tokens), y = product(kernel, w, x, kSchemes[0]);
    for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t r = 0; r < w.rows; ++r) {
            double exact = 0, size = 0;
            for (std::int64_t k = 0; k < w.columns; ++k) {
                const double value = x[static_cast<std::size_t>(t * w.columns + k)];
                exact += value * values[static_cast<std::size_t>(r * w.columns + k)];
                size += std::fabs(value) * ((1 << w.bits) + 4);
            }
            const double bound = 2 * std::numeric_limits<float>::epsilon() * std::sqrt(w.columns) * (size + 100);
            if (!(std::fabs(y[static_cast<std::size_t>(t * w.rows + r)] - exact) <= bound)) return false;
        }
    return true;
}

// Whether products of every scheme are those of the portable kernel, bit for bit.
bool as_portable(const Kernel& kernel, const Matrix& w, std::int64_t tokens) {
    const std::vector<float> x = tokens_of(w, tokens);
    bool right = true;
    for (const InputScheme& scheme : kSchemes)
        right = right && same(product(kernel, w, x, scheme), product(*find_kernel("portable"), w, x, scheme));
    return right;
}

// Whether both comparisons see a code with one wrong bit.
bool see_a_planted_fault(const Kernel& kernel) {
    Sample sample(7, 300, 64, 4, Grid::uniform, 0);
    const std::vector<float> values = dense(kernel, sample.matrix);
    sample.codes[500] ^= 1;
    sample.matrix.codes = sample.codes.data();
    return !same(values, dense(kernel, sample.matrix)) && !near(kernel, sample.matrix, values, 5);
}

// Whether a read beyond the end of the codes stops the process.
bool stops_a_read_beyond(const Kernel& kernel) {
    const pid_t child = fork();
    if (child == 0) {
        Sample sample(7, 300, 64, 4, Grid::uniform, 0);
        sample.matrix.rows += 1;
        dense(kernel, sample.matrix);
        _exit(0);
    }
    int status = 0;
    return child > 0 && waitpid(child, &status, 0) == child && status != 0;
}

}  // namespace

int main() {
    const Kernel& reference = *find_kernel("portable");
    int failures = 0;
    for (const std::string& name : instruction_sets())
        if (!stops_a_read_beyond(*find_kernel(name)) || !see_a_planted_fault(*find_kernel(name))) {
            std::printf("%s: a planted fault is not found\n", name.c_str());
            return 1;
        }
    for (const std::string& name : instruction_sets()) {
        const Kernel& kernel = *find_kernel(name);
        int cases = 0, wrong = 0;
        for (const int bits : {2, 3, 4, 8})
            for (const Grid grid : {Grid::uniform, Grid::sign, Grid::mxfp4})
                for (const std::int64_t columns : {1, 64, 300, 577})
                    for (const std::int64_t group : {5, 32, 64, 128, 577})
                        for (const int zero_kind : {0, 1, 2}) {
                            if ((grid == Grid::sign && bits == 8) || (grid == Grid::mxfp4 && bits != 4) ||
                                (grid != Grid::uniform && zero_kind != 0))
                                continue;
                            const Sample sample(37, columns, std::min(group, columns), bits, grid, zero_kind);
                            const std::vector<float> values = dense(kernel, sample.matrix);
                            bool right = same(values, dense(reference, sample.matrix));
                            if (zero_kind == 1)
                                for (std::size_t i = 0; i < values.size(); ++i)
                                    right = right && values[i] == sample.value(static_cast<std::int64_t>(i) / columns,
                                                                               static_cast<std::int64_t>(i) % columns);
                            for (const std::int64_t tokens : {1, 2, 13, 37})
                                right = right && near(kernel, sample.matrix, values, tokens) &&
                                        as_portable(kernel, sample.matrix, tokens);
                            release();
                            ++cases;
                            if (right) continue;
                            ++wrong;
                            std::printf("%s: %d bits, grid %d, %lld columns, groups of %lld, zero-points %d: wrong\n",
                                        name.c_str(), bits, static_cast<int>(grid), static_cast<long long>(columns),
                                        static_cast<long long>(group), zero_kind);
                        }
        std::printf("%s: %d of %d matrices are right\n", name.c_str(), cases - wrong, cases);
        failures += wrong;
    }
    return failures != 0;
}
