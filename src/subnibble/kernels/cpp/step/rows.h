// Rows that are summed at once, as many as fit the registers. Internal linkage only, see functions_of.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "step/functions.h"
#include "step/wide.h"

namespace {

namespace step {

using namespace wide;
using subnibble::Axis;
using subnibble::Number;
using subnibble::Gate;
using subnibble::Next;
using subnibble::KeyForm;
using subnibble::kTokens;
using subnibble::padded;
using subnibble::ValueForm;

// Rows whose sums fit the registers, beside two or four vectors for each.
constexpr int kScoreRows = kLanes == 16 ? 8 : 2, kWeighRows = kLanes == 16 ? 4 : 1;

// Call `run(number of rows as a constant, first row)` until all rows are done.
template <int MOST, typename Run>
SUBNIBBLE_INLINE void each_rows(std::int64_t rows, Run run) {
    std::int64_t r = 0;
    for (; rows - r >= MOST; r += MOST) run(std::integral_constant<int, MOST>{}, r);
    switch (rows - r) {
        case 7: if constexpr (MOST > 7) run(std::integral_constant<int, 7>{}, r); break;
        case 6: if constexpr (MOST > 6) run(std::integral_constant<int, 6>{}, r); break;
        case 5: if constexpr (MOST > 5) run(std::integral_constant<int, 5>{}, r); break;
        case 4: if constexpr (MOST > 4) run(std::integral_constant<int, 4>{}, r); break;
        case 3: if constexpr (MOST > 3) run(std::integral_constant<int, 3>{}, r); break;
        case 2: if constexpr (MOST > 2) run(std::integral_constant<int, 2>{}, r); break;
        case 1: if constexpr (MOST > 1) run(std::integral_constant<int, 1>{}, r); break;
        default: break;
    }
}

}  // namespace step

}  // namespace
