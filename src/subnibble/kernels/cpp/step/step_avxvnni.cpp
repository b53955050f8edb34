#include "step/functions_of.h"

namespace subnibble {
extern const StepFunctions step_avxvnni;
SUBNIBBLE_STEP_FUNCTIONS(step_avxvnni);
}  // namespace subnibble
