#include "step/functions_of.h"

namespace subnibble {
extern const StepFunctions step_avx2;
SUBNIBBLE_STEP_FUNCTIONS(step_avx2);
}  // namespace subnibble
