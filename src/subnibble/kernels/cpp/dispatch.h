// The kernels behind one function each: chooses the instruction set, shares rows among threads.
#pragma once

#include <string>
#include <vector>

#include "matrix.h"

namespace subnibble {

// Instruction sets that were compiled and that this processor runs, the fastest first; the last one is "portable".
std::vector<std::string> instruction_sets();

// The kernels of an instruction set; null if it is not among `instruction_sets()`.
const Kernel* find_kernel(const std::string& name);

// y (tokens, rows) float32 = x wᵀ, or += if `add`.
// x: (tokens, columns) float32 or bfloat16, `x_stride` elements from token to token. y: `y_stride` likewise.
void multiply(const Kernel& kernel, const Matrix& w, const void* x, Number x_type, std::int64_t tokens,
              std::int64_t x_stride, float* y, std::int64_t y_stride, bool add);

// Dense rows first .. last - 1 as float32 or bfloat16, the values of the reference bit for bit.
// out: (last - first, columns), `out_stride` elements from row to row.
void dequantize(const Kernel& kernel, const Matrix& w, std::int64_t first, std::int64_t last, void* out, Number type,
                std::int64_t out_stride);

}  // namespace subnibble
