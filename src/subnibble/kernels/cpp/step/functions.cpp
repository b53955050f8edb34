#include "step/functions.h"

namespace subnibble {

extern const StepFunctions step_portable;
extern const StepFunctions step_avx2, step_avxvnni, step_avx512, step_avx512vnni, step_neon;

const StepFunctions& step_functions([[maybe_unused]] const std::string& kernel) {
#if defined(SUBNIBBLE_AVX512VNNI)
    if (kernel == "avx512vnni" || kernel == "avx512amx") return step_avx512vnni;
#endif
#if defined(SUBNIBBLE_AVX512)
    if (kernel.rfind("avx512", 0) == 0) return step_avx512;
#endif
#if defined(SUBNIBBLE_AVXVNNI)
    if (kernel == "avxvnni") return step_avxvnni;
#endif
#if defined(SUBNIBBLE_AVX2)
    if (kernel.rfind("avx", 0) == 0) return step_avx2;
#endif
#if defined(SUBNIBBLE_NEON)
    if (kernel == "neon") return step_neon;
#endif
    return step_portable;
}

}  // namespace subnibble
