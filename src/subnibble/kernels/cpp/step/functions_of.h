// `StepFunctions` for the instruction set that the including source is compiled for. The files that it includes have
// internal linkage only: each source compiles its own copy.
#pragma once

#include "step/dense.h"
#include "step/keys.h"
#include "step/norms.h"
#include "step/values.h"

#define SUBNIBBLE_STEP_FUNCTIONS(name)                                                                               \
    const StepFunctions name{#name,           step::norm, step::gate,   step::add,   step::factor, step::dense,       \
                             step::key_scores, step::keys, step::scores, step::weigh, step::values, step::weigh_floats, \
                             step::exponentials, step::scale}
