// The kernels of ARMv8.2 with dot products of bytes.
#include "neon_vectors.h"
#include "products.h"
#include "rounding.h"
#include "segment_sums.h"

namespace subnibble {
// Rows are dequantized by the portable kernel.
const Kernel neon{"neon", 0, nullptr, products::product, rounding::round_token, sum_segments};
}  // namespace subnibble
