#pragma once

#include <nanobind/nanobind.h>

namespace subnibble {

// Add the classes of the decoder step to the module.
void bind_step(nanobind::module_& module);

}  // namespace subnibble
