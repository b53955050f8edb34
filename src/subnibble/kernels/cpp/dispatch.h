// The kernels behind one function each: chooses the instruction set, shares rows among threads.
#pragma once

#include <string>
#include <vector>

#include "input.h"
#include "matrix.h"
#include "operand.h"
#include "repack.h"

namespace subnibble {

// Instruction sets that were compiled and that this processor runs, the fastest first; the last one is "portable".
std::vector<std::string> instruction_sets();

// The kernels of an instruction set; null if it is not among `instruction_sets()`.
const Kernel* find_kernel(const std::string& name);

// y (tokens, rows) float32 = x wᵀ, or += if `add`; `y_stride` elements from token to token.
// x: its columns from `start` on are multiplied; of more columns than the weight has, the first ones.
void multiply(const Kernel& kernel, const Tiles& w, const Input& x, std::int64_t start, float* y, std::int64_t y_stride,
              bool add);

// The same for rows of tiles first .. last - 1, by the calling thread alone: allocates nothing, so that threads which
// share a product by tiles may run it within one parallel region.
// x: must suit the weight. scratch: `scratch_bytes` bytes of this thread's own, on a boundary of 64.
void multiply_tiles(const Kernel& kernel, const Tiles& w, const Operand& x, float* y, std::int64_t y_stride, bool add,
                    std::int64_t first, std::int64_t last, std::uint8_t* scratch);

// Working memory of `multiply_tiles`; 0 for up to four tokens, except with weights on a sign grid.
std::int64_t scratch_bytes(const Tiles& w, std::int64_t tokens);

// Dense rows first .. last - 1 as float32 or bfloat16, the values of the reference bit for bit.
// out: (last - first, columns), `out_stride` elements from row to row.
void dequantize(const Kernel& kernel, const Matrix& w, std::int64_t first, std::int64_t last, void* out, Number type,
                std::int64_t out_stride);

}  // namespace subnibble
