// The sources of AVX-512, compiled with VNNI and AMX.
#define SUBNIBBLE_USES_AMX
#include "avx512.h"
