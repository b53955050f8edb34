#include "step/functions_of.h"

namespace subnibble {
extern const StepFunctions step_avx512vnni;
SUBNIBBLE_STEP_FUNCTIONS(step_avx512vnni);
}  // namespace subnibble
