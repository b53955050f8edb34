#include "step/functions.h"

namespace subnibble {

extern const StepFunctions step_portable;
#if defined(SUBNIBBLE_X86)
extern const StepFunctions step_avx2;
extern const StepFunctions step_avx512;
#elif defined(SUBNIBBLE_NEON)
extern const StepFunctions step_neon;
#endif

const StepFunctions& step_functions([[maybe_unused]] const std::string& kernel) {
#if defined(SUBNIBBLE_X86)
    if (kernel.rfind("avx512", 0) == 0) return step_avx512;
    if (kernel.rfind("avx", 0) == 0) return step_avx2;
#elif defined(SUBNIBBLE_NEON)
    if (kernel == "neon") return step_neon;
#endif
    return step_portable;
}

}  // namespace subnibble
