// n of every m consecutive inputs. Each panel has 16 rows side by side: values [panel, group, slot, 16], where the
// slots of a group are its n values.
#pragma once
#include "linear.h"

namespace secateur {

struct Groups : Linear {
    // [panels, words, 16]. A word holds the places of values in their groups, from the lowest bits up: 2 bits each for
    // m <= 4, else 4. It holds those of as many whole groups as fit, or a part of one group.
    const uint32_t* words;
    int n, m;

    using Members = Linear::Members::And<&Groups::words, &Groups::n, &Groups::m>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
namespace secateur::SECATEUR_ISA {

constexpr int kPanelRows = 16;
constexpr int kVectors = kPanelRows / kWidth;

// One vector of a panel's rows times B rows of x. N is n, or 0 for any.
template <class T, int Bits, int N, int B>
SECATEUR_INLINE void groups_panel(const Groups& args, const uint32_t* words, const T* values, int64_t groups,
                                  const float* x, int64_t stride, int vector, F<kWidth>* out) {
    constexpr int kSlots = 32 / Bits;
    const int n = N ? N : args.n;
    const int group_words = n > kSlots ? (n + kSlots - 1) / kSlots : 1, word_groups = n > kSlots ? 1 : kSlots / n;
    constexpr int kSums = N && N * B <= 8 ? N : 1;
    F<kWidth> sums[B][kSums] = {};
    const T* v = values + vector * kWidth;
    for (int64_t g = 0; g < groups;) {
        if (group_words == 1) {
            Places places;
            places.read(words + vector * kWidth);
            words += kPanelRows;
            const int64_t stop = least(groups, g + word_groups);
#pragma GCC unroll 4
            for (; g < stop; ++g, x += args.m) {
                GroupInputs xs[B];
                for (int b = 0; b < B; ++b) xs[b] = load_group<Bits>(x + b * stride);
#pragma GCC unroll 4
                for (int slot = 0; slot < n; ++slot, v += kPanelRows) {
                    const F<kWidth> value = load_values<kWidth, T>(v);
                    for (int b = 0; b < B; ++b) sums[b][slot % kSums] += value * places.template take<Bits>(xs[b]);
                    places.template next<Bits>();
                }
            }
        } else {
            for (int slot = 0; slot < n;) {
                Places places;
                places.read(words + vector * kWidth);
                words += kPanelRows;
                for (const int stop = int(least(n, slot + kSlots)); slot < stop; ++slot, v += kPanelRows) {
                    const F<kWidth> value = load_values<kWidth, T>(v);
                    for (int b = 0; b < B; ++b)
                        sums[b][0] += value * places.template take<Bits>(load_group<Bits>(x + b * stride));
                    places.template next<Bits>();
                }
            }
            ++g;
            x += args.m;
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int s = 1; s < kSums; ++s) sums[b][0] += sums[b][s];
        out[b] = sums[b][0];
    }
}

template <class T, int Bits, int N> void groups_typed(const Groups& args) {
    constexpr int kSlots = 32 / Bits;
    const int64_t groups = args.columns / args.m, panels = ceil_div(args.rows, kPanelRows);
    const int64_t words = args.n > kSlots ? groups * ceil_div(args.n, kSlots) : ceil_div(groups, kSlots / args.n);
    int64_t stride;
    const float* x = padded_input(args, stride);
    each_in_parallel(args.threads, panels, 2, [&](int64_t p, int64_t) {
        const uint32_t* places = args.words + p * words * kPanelRows;
        const T* v = static_cast<const T*>(args.values) + p * groups * args.n * kPanelRows;
        constexpr int kBatch = kRegisters / 4;  // the inputs and sums of so many rows of x fit the registers
        F<kWidth> out[kBatch];
        for (int64_t b = 0; b < args.batch;) {
            const int64_t left = args.batch - b;
            const int step = left >= kBatch ? kBatch : left >= 4 ? 4 : left >= 2 ? 2 : 1;
            const float* xb = x + b * stride;
            for (int vector = 0; vector < kVectors; ++vector) {
                if (step == kBatch) groups_panel<T, Bits, N, kBatch>(args, places, v, groups, xb, stride, vector, out);
                else if (step == 4) groups_panel<T, Bits, N, 4>(args, places, v, groups, xb, stride, vector, out);
                else if (step == 2) groups_panel<T, Bits, N, 2>(args, places, v, groups, xb, stride, vector, out);
                else groups_panel<T, Bits, N, 1>(args, places, v, groups, xb, stride, vector, out);
                const int64_t row = p * kPanelRows + vector * kWidth;
                for (int i = 0; i < step; ++i)
                    for (int64_t r = 0; r < kWidth && row + r < args.rows; ++r)
                        args.y[(b + i) * args.rows + row + r] = finish(args, row + r, out[i][r]);
            }
            b += step;
        }
    });
}

inline void groups(const Groups& args) {
    with_type(args.value_type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (args.m > 4) groups_typed<T, 4, 0>(args);
        else if (args.n == 1) groups_typed<T, 2, 1>(args);
        else if (args.n == 2) groups_typed<T, 2, 2>(args);
        else groups_typed<T, 2, 0>(args);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
