// All weights as bytes, in panels of 16 rows: values [panel, ceil(columns / 4), 16, 4]. Rows and columns past the end are
// zeros. The inputs are rounded to bytes.
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

// N vectors of rows of the weight times B rows of x.
template <int B, int N>
SECATEUR_INLINE void int8_panels_part(const Int8Panels& args, const Rounded& x, int64_t b, int64_t vector) {
    constexpr int kVectors = kInt8Rows / kWidth;
    const int64_t words = ceil_div(args.columns, 4);
    const int8_t* w[N];
    for (int n = 0; n < N; ++n) {
        const int64_t panel = (vector + n) / kVectors, part = (vector + n) % kVectors;
        w[n] = static_cast<const int8_t*>(args.values) + (panel * words * kInt8Rows + part * kWidth) * 4;
    }
    const uint8_t* xb = x.bytes + b * x.stride;
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
                write_rounded(args, args.sums, x, b + i, (vector + n) * kWidth, sums[i][n]);
}

template <int N> SECATEUR_INLINE void int8_panels_rows(const Int8Panels& args, const Rounded& x, int64_t vector) {
    constexpr int kBatch = kRegisters == 32 ? 6 : 4;
    int64_t b = 0;
    for (; b + kBatch <= args.batch; b += kBatch) int8_panels_part<kBatch, N>(args, x, b, vector);
    for (; b + 2 <= args.batch; b += 2) int8_panels_part<2, N>(args, x, b, vector);
    if (b < args.batch) int8_panels_part<1, N>(args, x, b, vector);
}

inline void int8_panels(const Int8Panels& args) {
    constexpr int kTogether = kRegisters == 32 ? 4 : 2;  // vectors of rows whose sums stay in registers
    const Rounded x = rounded_input(args);
    const int64_t vectors = ceil_div(args.rows, kInt8Rows) * (kInt8Rows / kWidth);
    each_in_parallel(args.threads, ceil_div(vectors, kTogether), 1, [&](int64_t part, int64_t) {
        int64_t vector = part * kTogether;
        if (vector + kTogether <= vectors) return int8_panels_rows<kTogether>(args, x, vector);
        for (; vector < vectors; ++vector) int8_panels_rows<1>(args, x, vector);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
