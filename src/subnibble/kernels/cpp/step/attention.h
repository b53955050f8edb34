// Attention of the queries of one step over their sequences' keys and values, and over a prefix that all share.
//
// Text is read in ranges of 256 tokens, each with its own softmax; ranges are merged from left to right. So a query's
// result is the same whether it is alone or among others.
#pragma once

#include <cstdint>
#include <vector>

#include "step/functions.h"
#include "step/kv_store.h"
#include "step/site.h"
#include "step/team.h"

namespace subnibble {

// Keys and values before every text, at 16 bits, in runs of tiles of all heads; keys in the basis of queries.
struct PrefixTiles {
    std::int64_t tokens = 0;
    std::vector<std::uint8_t*> keys, values;
};

// What attention of one layer depends on beside queries.
struct AttentionLayer {
    // Last tokens that a query sees; 0 for all.
    std::int64_t window;
    PrefixTiles prefix;
    // (heads, width), subtracted from keys before they were coded; null for none.
    const float* key_center;
};

// Tokens of one sequence in a step: rows first .. first + count - 1 of the step are its tokens from `start` on.
struct Stretch {
    Sequence* sequence;
    std::int64_t first, count, start;
};

class Attention {
   public:
    // repeats: query heads for each key-value head. angles: rotated channels / 2.
    Attention(const StepFunctions& functions, KvStore& store, std::int64_t repeats, std::int64_t angles,
              std::int64_t prefix_tokens);

    std::int64_t scratch_numbers() const;
    // Divide a step's work. By one thread.
    void begin(const std::vector<Stretch>& stretches);
    // q: (tokens, query heads, width), scaled. Writes out, likewise. All threads; others read after they have met.
    void run(const Team& team, const AttentionLayer& layer, std::int64_t layer_index, const float* q, float* out,
             Scratch& scratch);

   private:
    // Some queries of one key-value head; of a single token, one range of its text.
    struct Unit {
        std::size_t stretch;
        std::int64_t head, token, tokens;
        // First range and the one after the last; range 0 is the prefix.
        std::int64_t first_range, last_range;
        // Where the result waits to be merged with those of other ranges; -1: it is the only one.
        std::int64_t partial;
    };
    // Sums that a softmax over some tokens leaves, for each row: values weighted by e^(score - most), and the weights.
    struct Sums {
        float* values;
        float *most, *total;
    };
    struct Work;

    void attend_range(const Unit& unit, std::int64_t range, const AttentionLayer& layer, std::int64_t layer_index,
                      const Work& work, Sums sums) const;
    // Where the keys of a unit's first range are.
    Next keys_of(const Unit& unit, const AttentionLayer& layer, std::int64_t layer_index) const;
    void rotate(float* keys, const float* angles) const;
    void merge(std::int64_t rows, Sums into, Sums from) const;
    void write(const Unit& unit, Sums sums, float* out) const;
    std::int64_t rows(const Unit& unit) const { return unit.tokens * repeats_; }

    const StepFunctions& functions_;
    KvStore& store_;
    std::int64_t repeats_, angles_, width_, room_, prefix_tokens_, prefix_tiles_;
    std::vector<Stretch> stretches_;
    std::vector<Unit> units_;
    std::vector<Unit> merged_;
    Aligned<float> partials_;
    std::int64_t partial_count_ = 0, partial_room_ = 0;
};

}  // namespace subnibble
