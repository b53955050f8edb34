#include "step/functions_of.h"

namespace subnibble {
extern const StepFunctions step_portable;
SUBNIBBLE_STEP_FUNCTIONS(step_portable);
}  // namespace subnibble
