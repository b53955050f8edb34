// The sources of AVX-512, compiled with VNNI.
#include "avx512.h"
