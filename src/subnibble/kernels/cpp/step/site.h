// A tensor of a decoder step and the linears that read it, as runtime/site_input.py and runtime/ops.py define them.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "step/functions.h"
#include "step/team.h"

namespace subnibble {

// Adjacent blocks of one order of a block-diagonal Hadamard matrix. Its factors are multiplied one after the other; the
// index of the first one runs fastest.
struct HadamardRun {
    std::int64_t order, count;
    struct Factor {
        std::int64_t order;
        const float* matrix;
    };
    std::vector<Factor> factors;
};

// y = x H for one token; both hold all runs' numbers. work: as many.
void multiply_hadamard(const StepFunctions& functions, const std::vector<HadamardRun>& runs, const float* x, float* y,
                       float* work);

// Steps on a tensor before linears multiply it. Pointers: null for no such step.
struct SiteSteps {
    std::int64_t width;
    const float* column_scale = nullptr;
    const std::int64_t* gather = nullptr;
    std::vector<HadamardRun> blocks;
    InputScheme scheme;
    // First channels whose error is rounded again.
    std::int64_t requantized = 0;
};

// Part of a packed matrix: its columns from `start` on.
struct TiledRange {
    Tiles tiles;
    std::int64_t start;
};

// A linear: packed terms, or a dense matrix (rows, width).
struct LinearTerms {
    std::int64_t rows;
    std::vector<TiledRange> main, salient, down, up;
    // How the result of `down` is rounded.
    InputScheme inner;
    const float* bias = nullptr;
    const void* dense = nullptr;
    Number dense_type = Number::float32;
};

// Working memory of one thread.
struct Scratch {
    Aligned<std::uint8_t> panels;
    Aligned<float> numbers;
};

class Site {
   public:
    Site(const Kernel& kernel, const StepFunctions& functions, SiteSteps steps, std::vector<LinearTerms> readers);

    std::int64_t width() const { return steps_.width; }
    // Make room for `tokens` tokens.
    // results: room for what all readers give, one after the other; null if `write_to` says where they go.
    // before: a site that is done with its tokens before this one begins, null for none. Its room serves this site as
    //   well, if both need the same.
    void reserve(std::int64_t tokens, float* results, const Site* before);
    // Numbers that all readers give for a token.
    std::int64_t result_numbers() const;
    // Let results of a reader go to y, (tokens, rows).
    void write_to(std::size_t reader, float* y) { y_[reader] = y; }
    // Bytes and numbers that a thread's `Scratch` must hold.
    std::int64_t panel_bytes() const;
    std::int64_t scratch_numbers() const { return 3 * steps_.width; }

    // Before `enter`, by one thread: how many tokens there will be.
    void begin(std::int64_t tokens);
    // Apply all steps to token `t`, x: (width). Any thread may enter a token.
    // room: `scratch_numbers` numbers.
    void enter(std::int64_t t, const float* x, float* room);
    // Multiply what was entered, with all threads; call `finish(reader, first row, last row)` for parts of readers as
    // they are done. Others must not read results before the threads have met.
    template <typename Finish>
    void multiply(const Team& team, Scratch& scratch, Finish finish) {
        multiply_low_rank(team, scratch);
        for (std::size_t i = 0; i < readers_.size(); ++i) {
            const auto [first, last] = part_of(team, i);
            if (first >= last) continue;
            multiply_part(i, first, last, scratch);
            finish(i, first, last);
        }
    }

    // Results of a reader: (tokens, rows), bias included.
    float* result(std::size_t reader) { return y_[reader]; }
    std::int64_t rows(std::size_t reader) const { return readers_[reader].rows; }

   private:
    // An input, and what the products with weights of each form need of it.
    struct Entered {
        std::unique_ptr<Input> input;
        std::vector<std::unique_ptr<Operand>> operands;

        const Operand& of(const TiledRange& range) const;
        void prepare(const std::vector<TiledRange>& ranges);
        void begin(std::int64_t tokens);
        void read(const Kernel& kernel, std::int64_t t);
    };
    struct LowRank {
        Aligned<float> inner;
        Entered entered;
    };

    // What a site holds of the tokens that were entered.
    struct Room {
        Entered x, rest;
        // Tokens after all steps before rounding; only if a reader is dense.
        Aligned<float> plain;
        std::vector<LowRank> low_rank;
    };

    std::unique_ptr<Room> new_room(std::int64_t tokens) const;
    bool needs_room_of(const Site& other) const;
    std::pair<std::int64_t, std::int64_t> part_of(const Team& team, std::size_t reader) const;
    void multiply_ranges(const Entered& x, const std::vector<TiledRange>& ranges, float* y, std::int64_t y_stride,
                         std::int64_t first, std::int64_t last, bool add, Scratch& scratch) const;
    void multiply_part(std::size_t reader, std::int64_t first, std::int64_t last, Scratch& scratch);
    void multiply_low_rank(const Team& team, Scratch& scratch);

    const Kernel& kernel_;
    const StepFunctions& functions_;
    SiteSteps steps_;
    std::vector<LinearTerms> readers_;
    std::shared_ptr<Room> room_;
    // Where results of each reader go.
    std::vector<float*> y_;
    std::int64_t tokens_ = 0;
    bool has_packed_ = false, has_dense_ = false, has_low_rank_ = false;
};

}  // namespace subnibble
