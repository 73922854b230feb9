// How work is cut into parts for threads.
#pragma once
#include <cstdint>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd/vector.h"

namespace secateur::SECATEUR_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// f(i, count) for each vector of n elements; count is less than a vector's width for the last one only.
template <class Function> SECATEUR_INLINE void each_vector(int64_t n, Function f) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) f(i, int64_t(kWidth));
    if (i < n) f(i, n - i);
}

}  // namespace secateur::SECATEUR_ISA
