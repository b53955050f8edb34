// The kernels in plain C++.
#include "portable_vectors.h"
#include "dequantize.h"
#include "products.h"
#include "rounding.h"
#include "segment_sums.h"

namespace subnibble {
const Kernel portable{"portable", L, dequantize, products::product, rounding::round_token, sum_segments};
}
