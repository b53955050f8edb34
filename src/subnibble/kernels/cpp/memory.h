// Memory on a boundary of 64 bytes, which is a vector's and a cache line's length.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace subnibble {

struct AlignedFree {
    void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};

template <typename T>
using Aligned = std::unique_ptr<T[], AlignedFree>;

// Uninitialized room for `count` values, at least one.
template <typename T>
Aligned<T> aligned(std::int64_t count) {
    const auto bytes = static_cast<std::size_t>(std::max<std::int64_t>(count, 1)) * sizeof(T);
    return Aligned<T>(static_cast<T*>(::operator new[](bytes, std::align_val_t{64})));
}

// Room for `bytes` bytes on a boundary of 64, shared out of large blocks, for weights that live long: on large pages they
// are read a fifth faster (bench/kernels.py). A block is freed when nothing in it is in use. Safe from several threads.
std::shared_ptr<std::uint8_t> long_lived(std::int64_t bytes);

// Tell the system that nobody reads `memory` soon: pages of a file are given back, and read again when they are needed.
void not_needed_soon(const void* memory, std::int64_t bytes);

}  // namespace subnibble
