// Rows of packed values, and one bit for each column that says where they stand.
#pragma once
#include "linear.h"

namespace secateur {

struct Bitmask : Linear {
    const uint64_t* mask;    // [rows, ceil(columns / 64)], lowest bit first
    const int64_t* offsets;  // [rows + 1], the first value of each row

    using Members = Linear::Members::And<&Bitmask::mask, &Bitmask::offsets>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "isa/machine.h"

namespace secateur::SECATEUR_ISA {

// One row of the weight times B rows of x, kPart columns at a time; 0 where there is no expand.
template <class T, int B, int kPart>
SECATEUR_INLINE void bitmask_row(const uint64_t* mask, int64_t words, const T* p, const float* x, int64_t stride,
                                 float* out) {
    if constexpr (kPart > 0) {
        // Independent sums hide the latency of an FMA. Four sums for each of four rows of x would not fit 16 registers.
        constexpr int kParts = 64 / kPart, kSums = B == 1 ? 4 : 2;
        F<kPart> sums[B][kSums] = {};
        for (int64_t w = 0; w < words; ++w, x += 64) {
            uint64_t bits = mask[w];
            // 2 KiB ahead. The float values of a word take up to four cache lines.
            for (int ahead = 0; ahead < (sizeof(T) == 4 ? 3 : 1); ++ahead) prefetch(p, 2048 + ahead * 64);
#pragma GCC unroll 8
            for (int part = 0; part < kParts; ++part) {
                const uint32_t some = uint32_t(bits) & ((1u << kPart) - 1);
                bits >>= kPart;
                const F<kPart> v = expand<kPart, T>(some, p);
                p += __builtin_popcount(some);
#pragma GCC unroll 4
                for (int b = 0; b < B; ++b) sums[b][part % kSums] += v * load<kPart>(x + b * stride + part * kPart);
            }
        }
        for (int b = 0; b < B; ++b) {
            F<kPart> total = sums[b][0];
            for (int s = 1; s < kSums; ++s) total += sums[b][s];
            out[b] = sum<kPart>(total);
        }
    } else {
        float sums[B] = {};
        for (int64_t w = 0; w < words; ++w, x += 64)
            for (uint64_t bits = mask[w]; bits; bits &= bits - 1) {
                const int column = __builtin_ctzll(bits);
                const float v = decode(*p++);
                for (int b = 0; b < B; ++b) sums[b] += v * x[b * stride + column];
            }
        for (int b = 0; b < B; ++b) out[b] = sums[b];
    }
}

// The rows from `first` to `last`. A function of its own: inside of a lambda the compiler has too few registers for it.
template <class T, int kPart>
__attribute__((noinline)) void bitmask_rows(const Bitmask& args, const float* x, int64_t stride, int64_t first,
                                            int64_t last) {
    const T* values = static_cast<const T*>(args.values);
    const int64_t words = ceil_div(args.columns, 64);
    for (int64_t row = first; row < last; ++row) {
        const uint64_t* mask = args.mask + row * words;
        const T* p = values + args.offsets[row];
        float out[4];
        for (int64_t b = 0; b < args.batch;) {
            const int64_t left = args.batch - b;
            const float* xb = x + b * stride;
            const int step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
            if (step == 4) bitmask_row<T, 4, kPart>(mask, words, p, xb, stride, out);
            else if (step == 2) bitmask_row<T, 2, kPart>(mask, words, p, xb, stride, out);
            else bitmask_row<T, 1, kPart>(mask, words, p, xb, stride, out);
            for (int i = 0; i < step; ++i, ++b) args.y[b * args.rows + row] = finish(args, row, out[i]);
        }
    }
}

template <class T, int kPart> void bitmask_typed(const Bitmask& args) {
    int64_t stride = args.columns;
    const float* x = args.columns % 64 ? padded_input(args, stride) : args.x;
    constexpr int64_t kTogether = 32;
    each_in_parallel(args.threads, ceil_div(args.rows, kTogether), 1, [&](int64_t part, int64_t) {
        const int64_t first = part * kTogether;
        bitmask_rows<T, kPart>(args, x, stride, first, least(first + kTogether, args.rows));
    });
}

inline void bitmask(const Bitmask& args) {
    with_type(args.value_type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (kWideExpandWidth && sizeof(T) == 4)
            if (fast_wide_expand) return bitmask_typed<T, kWideExpandWidth>(args);
        bitmask_typed<T, kExpandWidth>(args);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
