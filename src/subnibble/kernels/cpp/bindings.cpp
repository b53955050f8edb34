// The Python module.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>

#include "bound.h"
#include "step/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using subnibble::Form;
using subnibble::Input;
using subnibble::Number;
using subnibble::Scheme;
using subnibble::Weight;

void dequantize(const Form& form, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros,
                std::int64_t first, std::int64_t last, std::uintptr_t out, int type, std::int64_t out_stride) {
    subnibble::dequantize(*form.kernel, form.at(codes, scales, zeros), first, last, reinterpret_cast<void*>(out),
                          static_cast<Number>(type), out_stride);
}

}  // namespace

NB_MODULE(_native, module) {
    // Python keeps forms until the process ends, which is no leak.
    nb::set_leak_warnings(false);
    using Released = nb::call_guard<nb::gil_scoped_release>;
    nb::class_<Form>(module, "Form")
        .def(nb::init<const std::string&, std::int64_t, std::int64_t, std::int64_t, int, int, int, bool>(), "isa"_a,
             "rows"_a, "columns"_a, "group"_a, "bits"_a, "grid"_a, "scale_type"_a, "integer_zeros"_a);
    module.def("instruction_sets", &subnibble::instruction_sets);
    nb::class_<Input>(module, "Input").def_prop_ro("count", &Input::count).def_prop_ro("columns", &Input::columns);
    nb::class_<Scheme>(module, "Scheme")
        .def(nb::init<const std::string&, int, int, float, std::int64_t, std::int64_t, int>(), "isa"_a, "kind"_a,
             "last"_a, "clip"_a, "group"_a, "outliers"_a, "planes"_a)
        .def("round", &Scheme::round, Released())
        .def("rest", &Scheme::rest, Released());
    nb::class_<Weight>(module, "Weight")
        .def(nb::init<const Form&, std::uintptr_t, std::uintptr_t, std::uintptr_t>(), Released())
        .def("multiply", &Weight::multiply, Released())
        .def_prop_ro("nbytes", &Weight::nbytes);
    module.def("dequantize", &dequantize, Released());
    subnibble::bind_step(module);
}
