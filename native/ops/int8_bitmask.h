// Rows of packed bytes, and one bit for each column that says where they stand. The inputs are rounded to bytes.
#pragma once
#include "linear.h"

namespace secateur {

struct Int8Bitmask : Linear {
    const uint64_t* mask;    // [rows, ceil(columns / 64)], lowest bit first
    const int64_t* offsets;  // [rows + 1], the first value of each row
    const int32_t* sums;     // [rows] the sum of the bytes of each row

    using Members = Linear::Members::And<&Int8Bitmask::mask, &Int8Bitmask::offsets, &Int8Bitmask::sums>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "ops/int8_panels.h"
#include "transpose.h"

namespace secateur::SECATEUR_ISA {

constexpr int kBytes = 4 * kWidth;           // columns of a vector
constexpr int kVectorsOfWord = 64 / kBytes;  // of 64 columns

// The bits of one vector's columns.
SECATEUR_INLINE uint64_t part_of_word(uint64_t bits, int part) {
    if constexpr (kVectorsOfWord == 1) return bits;
    return (bits >> (part * kBytes)) & ((uint64_t(1) << (kBytes % 64)) - 1);
}

// One row of the weight times B rows of x.
template <int B>
SECATEUR_INLINE void int8_bitmask_row(const uint64_t* mask, int64_t words, const int8_t* p, const uint8_t* x,
                                      int64_t stride, Whole* out) {
    constexpr int kSums = B <= 2 ? 4 / B : 1;  // independent sums hide the latency of a dot product
    Whole sums[B][kSums] = {};
    const auto word = [&](int64_t w, int s) SECATEUR_INLINED {
        const uint64_t bits = mask[w];
        prefetch(p, 4096);
#pragma GCC unroll 4
        for (int part = 0; part < kVectorsOfWord; ++part) {
            const uint64_t some = part_of_word(bits, part);
            const Words v = expand_bytes(some, p);
            p += __builtin_popcountll(some);
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
                sums[b][s] = dot(sums[b][s], load_words<kWidth>(x + b * stride + w * 64 + part * kBytes), v);
        }
    };
    int64_t w = 0;
    for (; w + kSums <= words; w += kSums)
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) word(w + s, s);
    for (; w < words; ++w) word(w, 0);
    for (int b = 0; b < B; ++b) {
        for (int s = 1; s < kSums; ++s) sums[b][0] += sums[b][s];
        out[b] = sums[b][0];
    }
}

// The rows of a vector, from `first` on, times B rows of x.
template <int B>
__attribute__((noinline)) void int8_bitmask_rows(const Int8Bitmask& args, const Rounded& x, int64_t b, int64_t first) {
    const int64_t words = ceil_div(args.columns, 64), count = least(kWidth, args.rows - first);
    Whole found[B][kWidth] = {};
    for (int64_t r = 0; r < count; ++r) {
        const int8_t* p = static_cast<const int8_t*>(args.values) + args.offsets[first + r];
        Whole out[B];
        int8_bitmask_row<B>(args.mask + (first + r) * words, words, p, x.bytes + b * x.stride, x.stride, out);
        for (int i = 0; i < B; ++i) found[i][r] = out[i];
    }
    for (int i = 0; i < B; ++i) write_rounded(args, args.sums, x, b + i, first, sums_of_rows(found[i]));
}

// The 16 rows from `first` on, expanded to a panel.
__attribute__((noinline)) inline void int8_bitmask_panel(const Int8Bitmask& args, int64_t first, int8_t* panel) {
    const int64_t words = ceil_div(args.columns, 64);
    for (int64_t row = first; row < first + kInt8Rows; row += kWidth) {
        const int8_t* p[kWidth];
        const int64_t count = least(kWidth, args.rows - row);
        for (int64_t r = 0; r < count; ++r) p[r] = static_cast<const int8_t*>(args.values) + args.offsets[row + r];
        for (int64_t w = 0; w < words; ++w)
            for (int part = 0; part < kVectorsOfWord; ++part) {
                Words tile[kWidth] = {};
                for (int64_t r = 0; r < count; ++r) {
                    const uint64_t some = part_of_word(args.mask[(row + r) * words + w], part);
                    tile[r] = expand_bytes(some, p[r]);
                    p[r] += __builtin_popcountll(some);
                }
                transpose_words(tile);
                int8_t* to = panel + ((w * 16 + part * kWidth) * kInt8Rows + (row - first)) * 4;
                for (int k = 0; k < kWidth; ++k, to += kInt8Rows * 4) __builtin_memcpy(to, &tile[k], sizeof tile[k]);
            }
    }
}

// Up to so many rows of x are cheaper to multiply as the weight is expanded than from an expanded copy.
constexpr int64_t kFewRows = kWidth == 16 ? 16 : 8;

template <int N> struct Number { static constexpr int value = N; };

// Calls f(number of rows of x, the first of these, the first of kWidth rows of the weight) for all of both.
template <class Function> SECATEUR_INLINE void few_rows(const Linear& args, Function f) {
    each_in_parallel(args.threads, ceil_div(args.rows, kWidth), 32 / kWidth, [&](int64_t part, int64_t) {
        const int64_t row = part * kWidth;
        int64_t b = 0;
        for (; b + 4 <= args.batch; b += 4) f(Number<4>(), b, row);
        if (args.batch - b >= 2) f(Number<2>(), b, row), b += 2;
        if (args.batch > b) f(Number<1>(), b, row);
    });
}

inline void int8_bitmask(const Int8Bitmask& args) {
    const Rounded x = rounded_input(args);
    if (args.batch <= kFewRows)
        return few_rows(args, [&](auto rows, int64_t b, int64_t row)
                                  SECATEUR_INLINED { int8_bitmask_rows<decltype(rows)::value>(args, x, b, row); });
    // Expanded once, a few rows are multiplied as panels of all weights are.
    const int64_t words = ceil_div(args.columns, 64) * 16, vectors = ceil_div(args.rows, kInt8Rows) * kInt8Vectors;
    const int64_t panel = words * 4 * kInt8Rows, together = ceil_div(kInt8Together, kInt8Vectors);
    int8_t* work = static_cast<int8_t*>(scratch(kWork, args.threads * together * panel));
    each_in_parallel(args.threads, ceil_div(vectors, kInt8Vectors * together), 1, [&](int64_t part, int64_t thread) {
        int8_t* mine = work + thread * together * panel;
        const int64_t first = part * together * kInt8Vectors, last = least(first + together * kInt8Vectors, vectors);
        for (int64_t v = first; v < last; v += kInt8Vectors)
            int8_bitmask_panel(args, v * kWidth, mine + (v - first) / kInt8Vectors * panel);
        for (int64_t v = first; v < last; v += kInt8Together)
            int8_panels_some(args, {mine, words, first, args.sums}, x, v, last);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
