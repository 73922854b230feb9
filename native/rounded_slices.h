// Slices of rounded rows of x, for kernels whose vectors hold the same column of many rows.
#pragma once
#include "rounded.h"
#include "slices.h"

#if defined(SECATEUR_ISA)
namespace secateur::SECATEUR_ISA {

// Some rows of x side by side, in one of two orders. Rows past the batch are zeros.
struct Slice {
    const uint8_t* bytes;
    const float* scale;    // [lanes]
    const int32_t* zero;   // [lanes]
    int64_t start, lanes;  // its first row of x, and how many
};

// [columns / 4, lanes, 4] bytes, or [columns, lanes] with the lanes as `interleave` takes them.
enum class Order { kWords, kColumns };

constexpr int64_t kLeastLanes = kWidth < 8 ? kWidth : 8, kMostLanes = kWidth * 4;

// How many rows of x the next slice takes when `left` are left: all of a few, else at most a quarter more for padding.
inline int64_t rounded_lanes(int64_t left) {
    int64_t lanes = kLeastLanes;
    while (lanes < kMostLanes && (left > lanes * 3 / 2 || (lanes < 16 && left > lanes))) lanes *= 2;
    return lanes;
}

// The vectors whose lanes `interleave` reads: of a quarter of all lanes. 0 if those lanes have too few for it.
inline int64_t interleaved_width(int64_t lanes) {
    return lanes == kWidth * 4 ? kWidth : lanes == 32 && kWidth == 16 ? 8 : 0;
}

// Rounds rows of x from `start` + `lane` on into four lanes of a slice. `rows` holds four rounded rows.
inline void round_lanes(const Linear& args, Order order, const Slice& slice, int64_t lane, uint8_t* rows,
                        uint8_t* bytes, float* scale, int32_t* zero) {
    const int64_t words = ceil_div(args.columns, 4), stride = ceil_div(words, 4) * 16;
    for (int64_t i = 0; i < 4; ++i) {
        const int64_t b = slice.start + lane + i;
        uint8_t* row = rows + i * stride;
        scale[lane + i] = 0;
        zero[lane + i] = 0;
        if (b < args.batch) round_row(args.x + b * args.columns, args.columns, row, scale[lane + i], zero[lane + i]);
        const int64_t used = b < args.batch ? args.columns : 0;
        __builtin_memset(row + used, 0, size_t(stride - used));
    }
    // Where four lanes stand among the others, as `interleave` takes them.
    const int64_t width = order == Order::kColumns ? interleaved_width(slice.lanes) : 0;
    const int64_t quad = lane / 4, place = width ? quad % (width / 4) * 4 + quad / (width / 4) : quad;
    for (int64_t k = 0; k < words; k += 4) {
        F<4> t[4];
        for (int i = 0; i < 4; ++i) t[i] = (F<4>)load_words<4>(rows + i * stride + k * 4);
        transpose(t);
        for (int64_t i = 0; i < least(4, words - k); ++i) {
            if (order == Order::kWords) {
                __builtin_memcpy(bytes + ((k + i) * slice.lanes + lane) * 4, &t[i], 16);
                continue;
            }
            const Bytes four = across((Bytes)t[i]);
            for (int column = 0; column < 4; ++column)
                __builtin_memcpy(bytes + ((k + i) * 4 + column) * slice.lanes + place * 4,
                                 reinterpret_cast<const char*>(&four) + column * 4, 4);
        }
    }
}

// Calls f(part, slice, thread) for each part of the weight and each slice of the batch.
//
// Many slices are shared among the threads: a thread rounds its own, which stays in its cache while all parts of the
// weight pass by. Few slices would not keep all threads busy: then all are rounded first, and the parts of the weight
// are shared.
template <class Function>
inline void each_part_and_rounded_slice(const Linear& args, Order order, int64_t parts, Function f) {
    const int64_t whole = args.batch / kMostLanes, words = ceil_div(args.columns, 4);
    const int64_t row = ceil_div(words, 16) * 64, own = 4 * row, slot = kMostLanes * (row + 8) + own;
    if (whole >= 4 * args.threads || (whole && whole % args.threads == 0 && args.batch % kMostLanes == 0)) {
        char* memory = static_cast<char*>(scratch(kInput, args.threads * slot));
        each_in_parallel(args.threads, ceil_div(args.batch, kMostLanes), 1, [&](int64_t i, int64_t thread) {
            uint8_t* bytes = reinterpret_cast<uint8_t*>(memory + thread * slot);
            float* scale = reinterpret_cast<float*>(bytes + kMostLanes * row);
            int32_t* zero = reinterpret_cast<int32_t*>(scale + kMostLanes);
            for (int64_t b = i * kMostLanes, lanes; b < least(args.batch, (i + 1) * kMostLanes); b += lanes) {
                lanes = rounded_lanes(args.batch - b);
                const Slice slice = {bytes, scale, zero, b, lanes};
                for (int64_t lane = 0; lane < lanes; lane += 4)
                    round_lanes(args, order, slice, lane, bytes + kMostLanes * (row + 8), bytes, scale, zero);
                for (int64_t part = 0; part < parts; ++part) f(part, slice, thread);
            }
        });
        return;
    }
    int64_t lanes = 0;
    while (lanes < args.batch) lanes += rounded_lanes(args.batch - lanes);
    char* memory = static_cast<char*>(scratch(kInput, lanes * (row + 8) + args.threads * own));
    uint8_t* bytes = reinterpret_cast<uint8_t*>(memory);
    float* scale = reinterpret_cast<float*>(bytes + lanes * row);
    int32_t* zero = reinterpret_cast<int32_t*>(scale + lanes);
    const auto slice_at = [&](int64_t b) {
        return Slice{bytes + b * row, scale + b, zero + b, b, rounded_lanes(args.batch - b)};
    };
    each_in_parallel(rounding_threads(args), lanes / 4, kEqually, [&](int64_t quad, int64_t thread) {
        Slice slice = slice_at(0);
        while (slice.start + slice.lanes <= quad * 4) slice = slice_at(slice.start + slice.lanes);
        const int64_t b = slice.start;
        round_lanes(args, order, slice, quad * 4 - b, bytes + lanes * (row + 8) + thread * own, bytes + b * row,
                    scale + b, zero + b);
    });
    each_in_parallel(args.threads, parts, 1, [&](int64_t part, int64_t thread) {
        for (int64_t b = 0; b < args.batch;) {
            const Slice slice = slice_at(b);
            f(part, slice, thread);
            b += slice.lanes;
        }
    });
}

// Writes sums [count, lanes] of products of bytes to the columns of y from `row` on.
inline void unpack_rounded(const Linear& args, const int32_t* code_sums, const Slice& slice, const int32_t* sums,
                           int64_t row, int64_t count) {
    const int64_t wanted = least(slice.lanes, args.batch - slice.start), lanes = slice.lanes;
    const float* bias = args.bias ? args.bias + row : nullptr;
    // Inlined with a size that is known, because a copy of any size is slow.
    const auto part = [&](int64_t b, int64_t left, int64_t r, int64_t size) SECATEUR_INLINED {
        F<4> t[4];
        for (int i = 0; i < 4; ++i) t[i] = (F<4>)load_words<4>(sums + (r + i) * lanes + b);
        transpose(t);
        I<4> codes = {};
        F<4> scale = {}, offset = {};
        __builtin_memcpy(&codes, code_sums + row + r, size_t(size) * 4);
        __builtin_memcpy(&scale, args.scale + row + r, size_t(size) * 4);
        if (bias) __builtin_memcpy(&offset, bias + r, size_t(size) * 4);
#pragma GCC unroll 4
        for (int i = 0; i < left; ++i) {
            const int64_t lane = b + i;
            F<4> out =
                __builtin_convertvector((I<4>)t[i] - slice.zero[lane] * codes, F<4>) * (scale * slice.scale[lane]);
            if (bias) out += offset;
            __builtin_memcpy(args.y + (slice.start + lane) * args.rows + row + r, &out, size_t(size) * 4);
        }
    };
    for (int64_t b = 0; b < wanted; b += 4) {
        const int64_t left = least(4, wanted - b);
        int64_t r = 0;
        if (left == 4)
            for (; r + 4 <= count; r += 4) part(b, 4, r, 4);
        for (; r < count; r += 4) part(b, left, r, least(4, count - r));
    }
}

}  // namespace secateur::SECATEUR_ISA
#endif
