// An input as weights of one form multiply it: cut into segments, with the sums of each.
#pragma once

#include <vector>

#include "input.h"
#include "memory.h"
#include "tiles.h"

namespace subnibble {

class Operand {
   public:
    // Room for inputs with the columns and the scheme of `x`, of at most as many tokens.
    // start: the first column that weights multiply. columns, group: those of the weights.
    Operand(const Input& x, std::int64_t start, std::int64_t columns, std::int64_t group);

    // Take the numbers of x, which must live as long as they are multiplied. Allocates nothing; one thread.
    void read(const Kernel& kernel, const Input& x);
    // The same in two steps: once for x, and for each of its tokens by any thread.
    void attach(const Input& x);
    void read(const Kernel& kernel, const Input& x, std::int64_t token);

    // What `read` took.
    const Tokens& tokens() const { return tokens_; }
    std::int64_t start() const { return start_; }
    // Whether weights of this form may multiply it.
    bool suits(const Tiles& w) const { return w.columns == columns_ && w.group == group_; }

   private:
    // Copy a token's numbers so that zeros surround each segment's within its blocks.
    void arrange(const Input& x, std::int64_t token);

    std::int64_t start_, columns_, group_, room_ = 0;
    // Whether numbers lie so that zeros follow each segment's within its blocks, or nothing does.
    bool arranged_ = true;
    std::vector<Segment> segments_;
    // First column of each segment, and the number of columns.
    std::vector<std::int64_t> bounds_;
    Aligned<std::int8_t> numbers_;
    Aligned<std::int32_t> sums_;
    Aligned<float> float_sums_;
    Tokens tokens_{};
};

}  // namespace subnibble
