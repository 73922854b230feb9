// All weights as numbers from -7 to 7, in panels of 16 rows, with a scale for each row and group of 64 columns. Two
// neighbouring words of four columns lie in one: values [panel, group, 8, 16, 4], the first word in the lower halves of
// its bytes, and 8 is added to each number. The inputs are rounded to bytes.
#pragma once
#include "linear.h"

namespace secateur {

struct Int4Panels : Linear {
    const uint16_t* scales;  // float16 [panel, group, 16]
    const float* sums;       // [rows] the sum of the weights of each row

    using Members = Linear::Members::And<&Int4Panels::scales, &Int4Panels::sums>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "rounded.h"

namespace secateur::SECATEUR_ISA {

constexpr int kInt4Rows = 16, kInt4Vectors = kInt4Rows / kWidth;  // of a panel
constexpr int kInt4Together = 2;                                  // vectors of rows whose sums stay in registers

// Panels in memory, from the vector of rows `first` on.
struct GroupPanels {
    const uint8_t* values;  // halves of bytes as above, or bytes [panel, group, 16, 16, 4]
    const f16* scales;
    int64_t groups, first;
    const float* sums;  // of all rows of the weight
};

// N vectors of rows of the weight times B rows of x.
template <int B, int N, bool kHalves>
SECATEUR_INLINE void int4_panels_part(const Linear& args, const GroupPanels& panels, const Rounded& x, int64_t b,
                                      int64_t vector) {
    constexpr int64_t kWords = kInt4Rows * 4, kGroup = (kHalves ? 8 : 16) * kWords;
    const uint8_t* w[N];
    const f16* scales[N];
    for (int n = 0; n < N; ++n) {
        const int64_t at = vector + n - panels.first, panel = at / kInt4Vectors, part = at % kInt4Vectors;
        w[n] = panels.values + panel * panels.groups * kGroup + part * kWidth * 4;
        scales[n] = panels.scales + panel * panels.groups * kInt4Rows + part * kWidth;
    }
    const uint8_t* xb = x.bytes + b * x.stride;
    V totals[B][N] = {};
    for (int64_t group = 0; group < panels.groups; ++group, xb += 64) {
        Whole sums[B][N] = {};
#pragma GCC unroll 2
        for (int pair = 0; pair < 8; ++pair) {
            Words words[2][N];
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
                if constexpr (kHalves) {
                    const Words both = load_words<kWidth>(w[n] + pair * kWords);
                    if (B <= 2) prefetch(w[n] + pair * kWords, 4096);
                    words[0][n] = (Words)((SignedBytes)(both & 0x0f0f0f0fu) - int8_t(8));
                    words[1][n] = (Words)((SignedBytes)((both >> 4) & 0x0f0f0f0fu) - int8_t(8));
                } else {
                    words[0][n] = load_words<kWidth>(w[n] + 2 * pair * kWords);
                    words[1][n] = load_words<kWidth>(w[n] + (2 * pair + 1) * kWords);
                }
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half)
#pragma GCC unroll 8
                for (int i = 0; i < B; ++i) {
                    uint32_t word;
                    __builtin_memcpy(&word, xb + i * x.stride + (2 * pair + half) * 4, 4);
                    const Words all = Words{} + word;
#pragma GCC unroll 4
                    for (int n = 0; n < N; ++n) sums[i][n] = dot(sums[i][n], all, words[half][n]);
                }
        }
        for (int n = 0; n < N; ++n) {
            w[n] += kGroup;
            const V scale = load_values<kWidth, f16>(scales[n] + group * kInt4Rows);
            for (int i = 0; i < B; ++i) totals[i][n] += __builtin_convertvector(sums[i][n], V) * scale;
        }
    }
    for (int i = 0; i < B; ++i)
        for (int n = 0; n < N; ++n)
            if ((vector + n) * kWidth < args.rows)
                write_rounded(args, panels.sums, x, b + i, (vector + n) * kWidth, totals[i][n]);
}

template <int N, bool kHalves>
SECATEUR_INLINE void int4_panels_rows(const Linear& args, const GroupPanels& panels, const Rounded& x, int64_t vector) {
    constexpr int kBatch = kRegisters == 32 ? 5 : 2;
    int64_t b = 0;
    for (; b + kBatch <= args.batch; b += kBatch) int4_panels_part<kBatch, N, kHalves>(args, panels, x, b, vector);
    for (; b + 2 <= args.batch; b += 2) int4_panels_part<2, N, kHalves>(args, panels, x, b, vector);
    if (b < args.batch) int4_panels_part<1, N, kHalves>(args, panels, x, b, vector);
}

// Up to kInt4Together vectors of rows from `vector` on, of `vectors` in all.
template <bool kHalves>
__attribute__((noinline)) void int4_panels_some(const Linear& args, const GroupPanels& panels, const Rounded& x,
                                                int64_t vector, int64_t vectors) {
    if (vector + kInt4Together <= vectors) return int4_panels_rows<kInt4Together, kHalves>(args, panels, x, vector);
    for (; vector < vectors; ++vector) int4_panels_rows<1, kHalves>(args, panels, x, vector);
}

inline void int4_panels(const Int4Panels& args) {
    const Rounded x = rounded_input(args);
    const int64_t vectors = ceil_div(args.rows, kInt4Rows) * kInt4Vectors;
    const GroupPanels panels = {static_cast<const uint8_t*>(args.values), reinterpret_cast<const f16*>(args.scales),
                                ceil_div(args.columns, 64), 0, args.sums};
    each_in_parallel(args.threads, ceil_div(vectors, kInt4Together), 2, [&](int64_t part, int64_t) {
        int4_panels_some<true>(args, panels, x, part * kInt4Together, vectors);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
