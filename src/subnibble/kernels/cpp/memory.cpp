#include "memory.h"

#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace subnibble {

namespace {

// Bytes of a large page, and of a block. Pages of a block that nobody wrote to take no memory.
constexpr std::int64_t kPage = 1 << 21, kBlock = 1 << 25;

std::int64_t rounded_up(std::int64_t count, std::int64_t step) { return (count + step - 1) / step * step; }

std::shared_ptr<std::uint8_t> new_block(std::int64_t bytes) {
    constexpr std::align_val_t page{kPage};
    auto* memory = static_cast<std::uint8_t*>(::operator new[](static_cast<std::size_t>(bytes), page));
#if defined(__linux__)
    // Advice: without large pages the memory is as good, and slower.
    (void)madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
    return {memory, [page](std::uint8_t* block) { ::operator delete[](block, page); }};
}

}  // namespace

std::shared_ptr<std::uint8_t> long_lived(std::int64_t bytes) {
    static std::mutex mutex;
    // The block that has room left; it lives as long as something in it does.
    static std::weak_ptr<std::uint8_t> current;
    static std::int64_t used = 0;
    const std::int64_t size = rounded_up(std::max<std::int64_t>(bytes, 1), 64);
    if (size > kBlock / 2) return new_block(rounded_up(size, kPage));
    const std::lock_guard<std::mutex> lock(mutex);
    std::shared_ptr<std::uint8_t> block = current.lock();
    if (block == nullptr || used + size > kBlock) {
        block = new_block(kBlock);
        current = block;
        used = 0;
    }
    std::uint8_t* const memory = block.get() + used;
    used += size;
    return {block, memory};
}

void not_needed_soon([[maybe_unused]] const void* memory, [[maybe_unused]] std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_PAGEOUT)
    // Whole pages only: others share the first and the last one.
    constexpr std::uintptr_t page = 4096;
    const auto first = (reinterpret_cast<std::uintptr_t>(memory) + page - 1) / page * page;
    const auto last = (reinterpret_cast<std::uintptr_t>(memory) + static_cast<std::uintptr_t>(bytes)) / page * page;
    if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_PAGEOUT);
#endif
}

}  // namespace subnibble
