// The kernels of AVX-512, with whatever of its extensions the including source is compiled for.
#pragma once
#include "avx512_vectors.h"
#include "dequantize.h"
#include "products.h"
#include "rounding.h"
#include "segment_sums.h"

namespace subnibble {
#if defined(SUBNIBBLE_USES_AMX)
const Kernel avx512amx{"avx512amx", L, dequantize, products::product, rounding::round_token, sum_segments};
#elif defined(__AVX512VNNI__)
const Kernel avx512vnni{"avx512vnni", L, dequantize, products::product, rounding::round_token, sum_segments};
#else
const Kernel avx512{"avx512", L, dequantize, products::product, rounding::round_token, sum_segments};
#endif
}
