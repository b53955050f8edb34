// The kernels of AVX2, with whatever of its extensions the including source is compiled for.
#pragma once
#include "avx2_vectors.h"
#include "dequantize.h"
#include "products.h"
#include "rounding.h"
#include "segment_sums.h"

namespace subnibble {
#if defined(__AVXVNNI__)
const Kernel avxvnni{"avxvnni", L, dequantize, products::product, rounding::round_token, sum_segments};
#else
const Kernel avx2{"avx2", L, dequantize, products::product, rounding::round_token, sum_segments};
#endif
}
