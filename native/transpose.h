// As many rows of words as a vector has lanes: turned, or added up.
#pragma once
#include <utility>  // only for its types: see isa/isa.cpp

#include "simd/vector.h"

namespace secateur::SECATEUR_ISA {

template <int D, int A, int B, int... lanes>
SECATEUR_INLINE Words mixed(Words a, Words b, std::integer_sequence<int, lanes...>) {
    return __builtin_shufflevector(a, b, (lanes & D ? kWidth + (lanes ^ B) : lanes ^ A)...);
}

// Lane i of b, or of a where i lacks the bit D: lane i ^ B, or i ^ A, of these.
template <int D, int A, int B> SECATEUR_INLINE Words mixed(Words a, Words b) {
    return mixed<D, A, B>(a, b, std::make_integer_sequence<int, kWidth>());
}

// Lane j of row i becomes lane i of row j.
template <int D = kWidth / 2> SECATEUR_INLINE void transpose_words(Words (&rows)[kWidth]) {
    if constexpr (D > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i)
            if (!(i & D)) {
                const Words a = rows[i], b = rows[i + D];
                rows[i] = mixed<D, 0, D>(a, b);
                rows[i + D] = mixed<D, D, 0>(a, b);
            }
        transpose_words<D / 2>(rows);
    }
}

// Lane i of the result is the sum of the lanes of row i.
template <int D = kWidth / 2, class Row> SECATEUR_INLINE Row sums_of_rows(Row (&rows)[kWidth]) {
    if constexpr (D > 0) {
#pragma GCC unroll 8
        for (int i = 0; i < D; ++i) {
            const Words a = (Words)rows[i], b = (Words)rows[i + D];
            rows[i] = (Row)mixed<D, 0, 0>(a, b) + (Row)mixed<D, D, D>(a, b);
        }
        return sums_of_rows<D / 2, Row>(rows);
    }
    return rows[0];
}

}  // namespace secateur::SECATEUR_ISA
