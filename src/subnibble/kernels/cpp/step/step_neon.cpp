#include "step/functions_of.h"

namespace subnibble {
extern const StepFunctions step_neon;
SUBNIBBLE_STEP_FUNCTIONS(step_neon);
}  // namespace subnibble
