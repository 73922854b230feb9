// Slices of the batch: some rows of x side by side, [columns, lanes], so that one vector holds the same column of many
// rows. For the kernels of panels and tiles.
#pragma once
#include "linear.h"

namespace secateur::SECATEUR_ISA {

constexpr int64_t kMaxLanes = kWidth * 4;

// How many rows of x the next slice takes when `left` are left: all of a few, else at most a quarter more for padding.
inline int64_t lanes_for(int64_t left) {
    int64_t lanes = 4;
    while (lanes < kMaxLanes && (left > lanes * 3 / 2 || (lanes < 16 && left > lanes))) lanes *= 2;
    return lanes;
}

inline void transpose(F<4> (&t)[4]) {
    const F<4> a = __builtin_shufflevector(t[0], t[1], 0, 4, 1, 5), b = __builtin_shufflevector(t[2], t[3], 0, 4, 1, 5);
    const F<4> c = __builtin_shufflevector(t[0], t[1], 2, 6, 3, 7), d = __builtin_shufflevector(t[2], t[3], 2, 6, 3, 7);
    t[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
    t[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
    t[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
    t[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// Copies the columns from `first` to `last` of the rows from `start` on into a slice. Rows past the batch are zeros.
inline void pack_slice(const Linear& args, int64_t start, int64_t lanes, int64_t first, int64_t last, float* slice) {
    for (int64_t b0 = 0; b0 < lanes; b0 += 4) {
        const float* rows[4];
        for (int i = 0; i < 4; ++i)
            rows[i] = start + b0 + i < args.batch ? args.x + (start + b0 + i) * args.columns : nullptr;
        int64_t k = first;
        if (rows[3])
            for (; k + 4 <= last; k += 4) {
                F<4> t[4];
                for (int i = 0; i < 4; ++i) t[i] = load<4>(rows[i] + k);
                transpose(t);
                for (int i = 0; i < 4; ++i) store<4>(slice + (k + i) * lanes + b0, t[i]);
            }
        for (; k < last; ++k)
            for (int i = 0; i < 4; ++i) slice[k * lanes + b0 + i] = rows[i] ? rows[i][k] : 0.0f;
    }
}

// Calls f(part, first row of x, lanes, slice, thread) for each part of the weight and each slice of the batch.
//
// Many slices are shared among the threads: a thread packs its own, which stays in its cache while all parts of the
// weight pass by. Few slices would not keep all threads busy: then all threads pack all slices, and the parts of the
// weight are shared, at least `together` at a time.
template <class Function>
inline void each_part_and_slice(const Linear& args, int64_t parts, int64_t together, Function f) {
    const int64_t whole = args.batch / kMaxLanes;
    if (whole >= 4 * args.threads || (whole && whole % args.threads == 0 && args.batch % kMaxLanes == 0)) {
        const int64_t each = args.columns * kMaxLanes;
        float* slices = static_cast<float*>(scratch(kInput, args.threads * each * int64_t(sizeof(float))));
        each_in_parallel(args.threads, ceil_div(args.batch, kMaxLanes), 1, [&](int64_t i, int64_t thread) {
            float* slice = slices + thread * each;
            for (int64_t b = i * kMaxLanes, lanes; b < least(args.batch, (i + 1) * kMaxLanes); b += lanes) {
                lanes = least(kMaxLanes, lanes_for(args.batch - b));
                pack_slice(args, b, lanes, 0, args.columns, slice);
                for (int64_t part = 0; part < parts; ++part) f(part, b, lanes, slice, thread);
            }
        });
        return;
    }
    int64_t padded = 0;
    while (padded < args.batch) padded += lanes_for(args.batch - padded);
    float* x = static_cast<float*>(scratch(kInput, padded * args.columns * int64_t(sizeof(float))));
    each_in_parallel(args.threads, ceil_div(args.columns, 64), kEqually, [&](int64_t i, int64_t) {
        const int64_t first = i * 64, last = least(args.columns, first + 64);
        for (int64_t b = 0, lanes; b < args.batch; b += lanes) {
            lanes = lanes_for(args.batch - b);
            pack_slice(args, b, lanes, first, last, x + b * args.columns);
        }
    });
    each_in_parallel(args.threads, parts, together, [&](int64_t part, int64_t thread) {
        for (int64_t b = 0, lanes; b < args.batch; b += lanes) {
            lanes = lanes_for(args.batch - b);
            f(part, b, lanes, x + b * args.columns, thread);
        }
    });
}

// Writes sums [count, lanes] to the columns of y from `row` on, for the rows of the batch from `b0` on.
inline void unpack_output(const Linear& args, const float* sums, int64_t lanes, int64_t b0, int64_t row,
                          int64_t count) {
    const int64_t wanted = least(lanes, args.batch - b0);
    int64_t b = 0;
    for (; b + 4 <= wanted; b += 4) {
        float* y = args.y + (b0 + b) * args.rows + row;
        int64_t r = 0;
        for (; r + 4 <= count; r += 4) {
            F<4> t[4];
            for (int i = 0; i < 4; ++i) t[i] = load<4>(sums + (r + i) * lanes + b);
            transpose(t);
            for (int i = 0; i < 4; ++i) {
                if (args.scale) t[i] *= load<4>(args.scale + row + r);
                if (args.bias) t[i] += load<4>(args.bias + row + r);
                store<4>(y + i * args.rows + r, t[i]);
            }
        }
        for (; r < count; ++r)
            for (int i = 0; i < 4; ++i) y[i * args.rows + r] = finish(args, row + r, sums[r * lanes + b + i]);
    }
    for (; b < wanted; ++b)
        for (int64_t r = 0; r < count; ++r)
            args.y[(b0 + b) * args.rows + row + r] = finish(args, row + r, sums[r * lanes + b]);
}

}  // namespace secateur::SECATEUR_ISA
