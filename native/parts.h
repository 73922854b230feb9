// How work is cut into parts for threads.
#pragma once
#include <cstdint>

#include "fork.h"
#include "simd/vector.h"

namespace secateur::SECATEUR_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(i, thread) for each i below count, on at most `threads` threads. Each thread takes `together` neighbours at a
// time, when it is done with its last ones; with kEqually each thread takes one share of all, as large as the others'.
constexpr int64_t kEqually = 0;
template <class Function>
SECATEUR_INLINE void each_in_parallel(int threads, int64_t count, int64_t together, Function f) {
    struct Work {
        Function& f;
        int64_t count, together, next;
    } work = {f, count, together, 0};
    void (*const part)(void*, int, int) = [](void* given, int thread, int of) {
        Work& work = *static_cast<Work*>(given);
        const bool equally = work.together == kEqually;
        const int64_t size = equally ? ceil_div(work.count, of) : work.together;
        const auto next = [&] { return __atomic_fetch_add(&work.next, size, __ATOMIC_RELAXED); };
        // f is called in one place, so that it is compiled into this loop: some kernels have thousands of short parts.
        for (int64_t first = equally ? size * thread : next(); first < work.count;) {
            const int64_t last = least(first + size, work.count);
            for (int64_t i = first; i < last; ++i) work.f(i, int64_t(thread));
            first = equally ? work.count : next();
        }
    };
    if (threads > 1 && count > 1) fork(threads, part, &work);
    else part(&work, 0, 1);
}

// f(i, count) for each vector of n elements; count is less than a vector's width for the last one only.
template <class Function> SECATEUR_INLINE void each_vector(int64_t n, Function f) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) f(i, int64_t(kWidth));
    if (i < n) f(i, n - i);
}

}  // namespace secateur::SECATEUR_ISA
