// What Python holds: addresses are passed as integers, so that neither torch nor NumPy is needed to build the module.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace subnibble {

inline const Kernel& kernel_of(const std::string& name) {
    if (const Kernel* kernel = find_kernel(name)) return *kernel;
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
    const Tiles& tiles() const { return repacked_.tiles(); }

   private:
    const Kernel* kernel_;
    Repacked repacked_;
};

// How tokens are rounded, for one instruction set.
struct Scheme {
    const Kernel* kernel;
    InputScheme scheme;

    Scheme(const std::string& isa, int kind, int last, float clip, std::int64_t group, std::int64_t outliers,
           int planes)
        : kernel(&kernel_of(isa)),
          scheme{{static_cast<Rounding::Kind>(kind), last, clip}, group, outliers, planes} {
        if (kind < 0 || kind > 3 || group < 1 || outliers < 0 || planes < 1 || planes > 3)
            throw std::invalid_argument("no kernel for inputs of this scheme");
    }

    Dense dense(std::uintptr_t x, int type, std::int64_t tokens, std::int64_t columns,
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

}  // namespace subnibble
