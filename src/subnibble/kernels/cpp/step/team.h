// The threads that run one step together: all of them call the same functions, and meet at barriers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace subnibble {

struct Team {
    std::int64_t threads, index;

    // Wait for all others.
    void meet() const {
#if defined(_OPENMP)
        if (threads > 1) {
#pragma omp barrier
        }
#endif
    }
    // This thread's part of 0 .. count - 1; parts begin at multiples of `step`.
    std::pair<std::int64_t, std::int64_t> share(std::int64_t count, std::int64_t step = 1) const {
        const std::int64_t parts = (count + step - 1) / step;
        return {step * (parts * index / threads), std::min(count, step * (parts * (index + 1) / threads))};
    }
};

// Run `work(team)` on `threads` threads.
template <typename Work>
void run_together([[maybe_unused]] std::int64_t threads, Work work) {
#if defined(_OPENMP)
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
    work(Team{omp_get_num_threads(), omp_get_thread_num()});
#else
    work(Team{1, 0});
#endif
}

}  // namespace subnibble
