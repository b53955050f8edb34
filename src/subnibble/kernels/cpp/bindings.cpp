// The Python module: addresses are passed as integers, so that neither torch nor NumPy is needed to build it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <stdexcept>

#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using subnibble::Grid;
using subnibble::Input;
using subnibble::Kernel;
using subnibble::Matrix;
using subnibble::Number;

const Kernel& kernel_of(const std::string& name) {
    if (const Kernel* kernel = subnibble::find_kernel(name)) return *kernel;
    throw std::invalid_argument("this processor does not run kernels for " + name);
}

// Form of a matrix, without its data: the same for all calls.
struct Form {
    std::int64_t rows, columns, group;
    int bits, grid, scale_type;
    bool integer_zeros;
    const Kernel* kernel;

    Form(const std::string& isa, std::int64_t rows_, std::int64_t columns_, std::int64_t group_, int bits_, int grid_,
         int scale_type_, bool integer_zeros_)
        : rows(rows_), columns(columns_), group(group_), bits(bits_), grid(grid_), scale_type(scale_type_),
          integer_zeros(integer_zeros_), kernel(&kernel_of(isa)) {
        const bool known = (bits == 2 || bits == 3 || bits == 4 || bits == 8) && grid >= 0 && grid <= 2 &&
                           scale_type >= 0 && scale_type <= 3 && rows >= 0 && columns >= 0 && group >= 1;
        if (!known || (grid == 1 && bits == 8) || (grid == 2 && bits != 4))
            throw std::invalid_argument("no kernel for a matrix of this form");
    }

    Matrix at(std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros) const {
        return {reinterpret_cast<const std::uint8_t*>(codes),
                reinterpret_cast<const std::uint8_t*>(scales),
                reinterpret_cast<const std::uint8_t*>(zeros),
                rows,
                columns,
                bits,
                group,
                static_cast<Grid>(grid),
                static_cast<Number>(scale_type),
                integer_zeros};
    }
};

// A packed weight in tiles, for one instruction set.
class Weight {
   public:
    Weight(const Form& form, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros)
        : kernel_(form.kernel), repacked_(form.at(codes, scales, zeros)) {}

    void multiply(const Input& x, std::int64_t start, std::uintptr_t y, std::int64_t y_stride, bool add) const {
        subnibble::multiply(*kernel_, repacked_.tiles(), x, start, reinterpret_cast<float*>(y), y_stride, add);
    }
    std::int64_t nbytes() const { return repacked_.nbytes(); }

   private:
    const Kernel* kernel_;
    subnibble::Repacked repacked_;
};

// How tokens are rounded, for one instruction set.
struct Scheme {
    const Kernel* kernel;
    subnibble::InputScheme scheme;

    Scheme(const std::string& isa, int kind, int last, float clip, std::int64_t group, std::int64_t outliers,
           int planes)
        : kernel(&kernel_of(isa)),
          scheme{{static_cast<subnibble::Rounding::Kind>(kind), last, clip}, group, outliers, planes} {
        if (kind < 0 || kind > 3 || group < 1 || outliers < 0 || planes < 1 || planes > 3)
            throw std::invalid_argument("no kernel for inputs of this scheme");
    }

    subnibble::Dense dense(std::uintptr_t x, int type, std::int64_t tokens, std::int64_t columns,
                           std::int64_t stride) const {
        return {reinterpret_cast<const std::uint8_t*>(x), static_cast<Number>(type), tokens, columns, stride};
    }
    Input round(std::uintptr_t x, int type, std::int64_t tokens, std::int64_t columns, std::int64_t stride) const {
        return Input(*kernel, dense(x, type, tokens, columns, stride), scheme);
    }
    Input rest(const Input& quantized, std::uintptr_t x, int type, std::int64_t stride, std::int64_t columns) const {
        return quantized.rest(*kernel, dense(x, type, quantized.count(), quantized.columns(), stride), columns);
    }
};

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
}
