// kernels_check: compares every instruction set of this processor with the portable kernels, and those with the formula
// of a uniform grid, on random matrices. For processors that only a cross compiler and an emulator reach.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

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

// A matrix with its data: random codes, positive float32 scales (bytes near 2^0 as e8m0), and real zero-points, integer
// ones or none.
struct Sample {
    std::vector<std::uint8_t> codes, zeros;
    std::vector<float> scales, real_zeros;
    Matrix matrix;

    Sample(std::int64_t rows, std::int64_t columns, std::int64_t group, int bits, Grid grid, int zero_kind) {
        const std::int64_t groups = up(columns, group), numbers = groups * (grid == Grid::sign ? bits : 1);
        codes = random_bytes(rows * up(columns * bits, 8));
        for (std::int64_t i = 0; i < rows * numbers; ++i) scales.push_back(uniform(0.01f, 1.0f));
        for (std::int64_t i = 0; i < rows * groups; ++i) real_zeros.push_back(uniform(0.0f, 3.0f));
        zeros = random_bytes(rows * up(groups * bits, 8));
        if (grid == Grid::mxfp4)
            for (std::int64_t i = 0; i < rows * groups; ++i)
                reinterpret_cast<std::uint8_t*>(scales.data())[i] = static_cast<std::uint8_t>(120 + generator() % 8);
        const void* zero = zero_kind == 0 ? nullptr : zero_kind == 1 ? static_cast<const void*>(real_zeros.data())
                                                                      : zeros.data();
        matrix = {codes.data(), reinterpret_cast<const std::uint8_t*>(scales.data()),
                  static_cast<const std::uint8_t*>(zero), rows, columns, bits, group, grid,
                  grid == Grid::mxfp4 ? Number::e8m0 : Number::float32, zero_kind == 2};
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
    std::vector<float> out(static_cast<std::size_t>(w.rows * w.columns), NAN);
    dequantize(kernel, w, 0, w.rows, out.data(), Number::float32, w.columns);
    return out;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Every element within 2 eps sqrt(K) (|x| @ |w|) of the product in double.
bool near(const Kernel& kernel, const Matrix& w, const std::vector<float>& values, std::int64_t tokens) {
    std::vector<float> x, y(static_cast<std::size_t>(tokens * w.rows), NAN);
    for (std::int64_t i = 0; i < tokens * w.columns; ++i) x.push_back(uniform(-1.0f, 1.0f) * (i % 7 ? 1.0f : 100.0f));
    multiply(kernel, w, x.data(), Number::float32, tokens, w.columns, y.data(), w.rows, false);
    for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t r = 0; r < w.rows; ++r) {
            double exact = 0, size = 0;
            for (std::int64_t k = 0; k < w.columns; ++k) {
                const double term = static_cast<double>(x[static_cast<std::size_t>(t * w.columns + k)]) *
                                    values[static_cast<std::size_t>(r * w.columns + k)];
                exact += term;
                size += std::fabs(term);
            }
            const double bound = 2 * std::numeric_limits<float>::epsilon() * std::sqrt(w.columns) * size;
            if (!(std::fabs(y[static_cast<std::size_t>(t * w.rows + r)] - exact) <= bound)) return false;
        }
    return true;
}

// Whether both comparisons see a code with one wrong bit.
bool see_a_planted_fault(const Kernel& kernel) {
    Sample sample(7, 300, 64, 4, Grid::uniform, 0);
    const std::vector<float> values = dense(kernel, sample.matrix);
    sample.codes[500] ^= 1;
    return !same(values, dense(kernel, sample.matrix)) && !near(kernel, sample.matrix, values, 5);
}

}  // namespace

int main() {
    const Kernel& reference = *find_kernel("portable");
    int failures = 0;
    if (!see_a_planted_fault(reference)) {
        std::printf("the comparisons do not see a planted fault\n");
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
                            const Sample sample(7, columns, std::min(group, columns), bits, grid, zero_kind);
                            const std::vector<float> values = dense(kernel, sample.matrix);
                            bool right = same(values, dense(reference, sample.matrix));
                            if (zero_kind == 1)
                                for (std::size_t i = 0; i < values.size(); ++i)
                                    right = right && values[i] == sample.value(static_cast<std::int64_t>(i) / columns,
                                                                               static_cast<std::int64_t>(i) % columns);
                            for (const std::int64_t tokens : {1, 5})
                                right = right && near(kernel, sample.matrix, values, tokens);
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
