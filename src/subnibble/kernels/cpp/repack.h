// A packed weight, repacked into tiles; it owns them.
#pragma once

#include "matrix.h"
#include "memory.h"
#include "tiles.h"

namespace subnibble {

class Repacked {
   public:
    // Copies `w`, whose memory is not needed afterwards. Rows are shared among OpenMP's threads.
    explicit Repacked(const Matrix& w);

    const Tiles& tiles() const { return tiles_; }
    // Bytes of memory.
    std::int64_t nbytes() const { return nbytes_; }

   private:
    Tiles tiles_{};
    std::int64_t nbytes_ = 0;
    std::shared_ptr<std::uint8_t> memory_;
};

}  // namespace subnibble
