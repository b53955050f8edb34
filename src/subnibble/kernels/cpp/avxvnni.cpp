// The sources of AVX2, compiled with AVX-VNNI.
#include "avx2.h"
