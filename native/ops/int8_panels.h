// All weights as bytes, in panels of 16 rows: values [panel, ceil(columns / 4), 16, 4]. Rows and columns past the end
// are zeros. The inputs are rounded to bytes.
#pragma once
#include "linear.h"

namespace secateur {

struct Int8Panels : Linear {
    const int32_t* sums;  // [rows] the sum of the bytes of each row

    using Members = Linear::Members::And<&Int8Panels::sums>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "rounded.h"

namespace secateur::SECATEUR_ISA {

constexpr int kInt8Rows = 16;

constexpr int kInt8Vectors = kInt8Rows / kWidth;         // of a panel
constexpr int kInt8Together = kRegisters == 32 ? 4 : 2;  // vectors of rows whose sums stay in registers

// Panels of bytes in memory, from the vector of rows `first` on.
struct BytePanels {
    const int8_t* bytes;
    int64_t words;  // of four columns
    int64_t first;
    const int32_t* sums;  // of all rows of the weight
};

// N vectors of rows of the weight times B rows of x.
template <int B, int N>
SECATEUR_INLINE void int8_panels_part(const Linear& args, const BytePanels& panels, const Rounded& x, int64_t b,
                                      int64_t vector) {
    const int64_t words = panels.words;
    const int8_t* w[N];
    for (int n = 0; n < N; ++n) {
        const int64_t at = vector + n - panels.first, panel = at / kInt8Vectors, part = at % kInt8Vectors;
        w[n] = panels.bytes + (panel * words * kInt8Rows + part * kWidth) * 4;
    }
    const uint8_t* xb = x.bytes + b * x.stride;
    for (int i = 0; i < B; ++i)  // a store to memory that is not in the cache waits for it
        for (int n = 0; n < N; ++n) __builtin_prefetch(args.y + (b + i) * args.rows + (vector + n) * kWidth, 1);
    Whole sums[B][N] = {};
    for (int64_t k = 0; k < words; ++k) {
        Words ws[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) ws[n] = load_words<kWidth>(w[n] + k * kInt8Rows * 4);
#pragma GCC unroll 8
        for (int i = 0; i < B; ++i) {
            uint32_t word;
            __builtin_memcpy(&word, xb + i * x.stride + k * 4, 4);
            const Words all = Words{} + word;
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sums[i][n] = dot(sums[i][n], all, ws[n]);
        }
    }
    for (int i = 0; i < B; ++i)
        for (int n = 0; n < N; ++n)
            if ((vector + n) * kWidth < args.rows)
                write_rounded(args, panels.sums, x, b + i, (vector + n) * kWidth, sums[i][n]);
}

// All rows of x, a few at a time, as equally as possible: each pass over the weight's rows reads them from a cache.
template <int N, int B = (kRegisters == 32 ? 6 : 4)>
SECATEUR_INLINE void int8_panels_passes(const Linear& args, const BytePanels& panels, const Rounded& x, int64_t vector,
                                        int64_t first, int64_t passes) {
    if constexpr (B > 0) {
        int64_t b = first;
        for (; args.batch - b > (B - 1) * passes; --passes, b += B) int8_panels_part<B, N>(args, panels, x, b, vector);
        int8_panels_passes<N, B - 1>(args, panels, x, vector, b, passes);
    }
}

template <int N>
inline void int8_panels_rows(const Linear& args, const BytePanels& panels, const Rounded& x, int64_t vector) {
    int8_panels_passes<N>(args, panels, x, vector, 0, ceil_div(args.batch, kRegisters == 32 ? 6 : 4));
}

// Up to kInt8Together vectors of rows from `vector` on, of `vectors` in all.
inline void int8_panels_some(const Linear& args, const BytePanels& panels, const Rounded& x, int64_t vector,
                             int64_t vectors) {
    if (vector + kInt8Together <= vectors) return int8_panels_rows<kInt8Together>(args, panels, x, vector);
    for (; vector < vectors; ++vector) int8_panels_rows<1>(args, panels, x, vector);
}

// Many rows of x are shared among the threads: a thread rounds some, which stay in its cache while the weight passes
// by. With few rows the threads share the weight.
inline void int8_panels(const Int8Panels& args) {
    constexpr int64_t kShare = 48, kCached = 262144;  // rows of a thread, and bytes of rows that stay in its cache
    const BytePanels panels = {static_cast<const int8_t*>(args.values), ceil_div(args.columns, 4), 0, args.sums};
    const int64_t vectors = ceil_div(args.rows, kInt8Rows) * kInt8Vectors, parts = ceil_div(vectors, kInt8Together);
    if (args.batch < kShare * args.threads) {
        const Rounded x = rounded_input(args);
        each_in_parallel(args.threads, parts, 1, [&](int64_t part, int64_t) {
            int8_panels_some(args, panels, x, part * kInt8Together, vectors);
        });
        return;
    }
    const int64_t cached = kCached / rounded_stride(args) > kShare ? kCached / rounded_stride(args) : kShare;
    const int64_t shares = ceil_div(args.batch, cached * args.threads) * args.threads;
    Linear block = args;
    block.batch = ceil_div(args.batch, shares);
    const int64_t each = rounded_size(block);
    char* memory = static_cast<char*>(scratch(kInput, args.threads * each));
    each_in_parallel(args.threads, shares, 1, [&](int64_t share, int64_t thread) {
        Linear mine = block;
        const int64_t first = share * block.batch;
        mine.batch = least(block.batch, args.batch - first);
        if (mine.batch <= 0) return;
        mine.threads = 1;
        mine.x += first * args.columns;
        mine.y += first * args.rows;
        const Rounded x = rounded_input(mine, memory + thread * each);
        for (int64_t part = 0; part < parts; ++part) int8_panels_some(mine, panels, x, part * kInt8Together, vectors);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
