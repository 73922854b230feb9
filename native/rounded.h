// Rows of x, rounded to bytes, for weights of eight bits. docs/runtime.md says exactly how, and the reference in
// secateur/kernels/_int8.py does the same.
#pragma once
#include "linear.h"

#if defined(SECATEUR_ISA)
namespace secateur::SECATEUR_ISA {

// Each row as bytes: x is about scale * (byte - zero).
struct Rounded {
    const uint8_t* bytes;  // [batch, stride]
    int64_t stride;        // a multiple of 64; bytes after the last column are 0
    const float* scale;    // [batch]; NaN for a row that is not finite, all of whose bytes are 0
    const int32_t* zero;   // [batch]
};

inline void round_row(const float* x, int64_t columns, uint8_t* to, float& scale, int32_t& zero) {
    V lows = {}, highs = {}, wrong = {};
    each_vector(columns, [&](int64_t i, int64_t count) SECATEUR_INLINED {
        const V v = read(x + i, count);
        lows = v < lows ? v : lows;
        highs = v > highs ? v : highs;
        wrong += v * 0.0f;  // NaN for what is not finite
    });
    float low = 0, high = 0;
    for (int i = 0; i < kWidth; ++i) {
        low = lows[i] < low ? lows[i] : low;
        high = highs[i] > high ? highs[i] : high;
    }
    if (sum<kWidth>(wrong) != 0.0f) {
        scale = __builtin_nanf("");
        zero = 0;
        __builtin_memset(to, 0, size_t(columns));
        return;
    }
    constexpr float kLeast = 1.17549435e-38f;  // the smallest normal number, so that the inverse is finite
    scale = high / 255 - low / 255;
    if (scale < kLeast) scale = kLeast;
    const float inverse = 1 / scale;
    zero = int32_t(__builtin_lrintf(-low * inverse));
    zero = zero > 255 ? 255 : zero;
    each_vector(columns, [&](int64_t i, int64_t count) SECATEUR_INLINED {
        if (count == kWidth) return to_bytes(to + i, load<kWidth>(x + i) * inverse, zero);
        uint8_t last[kWidth];
        to_bytes(last, read(x + i, count) * inverse, zero);
        __builtin_memcpy(to + i, last, size_t(count));
    });
}

// Few inputs are rounded sooner than another thread starts.
inline int rounding_threads(const Linear& args) { return args.batch * args.columns > 16384 ? args.threads : 1; }

// All rows of x, in memory of rounded_size(args) bytes that starts at a multiple of 64.
inline int64_t rounded_stride(const Linear& args) { return ceil_div(args.columns, 64) * 64; }
inline int64_t rounded_size(const Linear& args) { return ceil_div(args.batch * (rounded_stride(args) + 8), 64) * 64; }
inline Rounded rounded_input(const Linear& args, void* memory) {
    const int64_t stride = rounded_stride(args), batch = args.batch;
    uint8_t* bytes = static_cast<uint8_t*>(memory);
    float* scale = reinterpret_cast<float*>(bytes + batch * stride);
    int32_t* zero = reinterpret_cast<int32_t*>(bytes + batch * (stride + 4));
    each_in_parallel(rounding_threads(args), batch, kEqually, [&](int64_t b, int64_t) {
        uint8_t* to = bytes + b * stride;
        round_row(args.x + b * args.columns, args.columns, to, scale[b], zero[b]);
        __builtin_memset(to + args.columns, 0, size_t(stride - args.columns));
    });
    return {bytes, stride, scale, zero};
}
inline Rounded rounded_input(const Linear& args) { return rounded_input(args, scratch(kInput, rounded_size(args))); }

// The outputs of kWidth rows of the weight from `row` on, given the sums of the products of bytes.
SECATEUR_INLINE void write_rounded(const Linear& args, const int32_t* code_sums, const Rounded& x, int64_t b,
                                   int64_t row, Whole sums) {
    const int64_t count = least(kWidth, args.rows - row);
    const Whole codes = read(code_sums + row, count);
    V y = __builtin_convertvector(sums - x.zero[b] * codes, V) * (read(args.scale + row, count) * x.scale[b]);
    if (args.bias) y += read(args.bias + row, count);
    write(args.y + b * args.rows + row, y, count);
}

// The same, given the sums of the products of bytes with weights that are not whole numbers.
SECATEUR_INLINE void write_rounded(const Linear& args, const float* weight_sums, const Rounded& x, int64_t b,
                                   int64_t row, V sums) {
    const int64_t count = least(kWidth, args.rows - row);
    V y = (sums - float(x.zero[b]) * read(weight_sums + row, count)) * x.scale[b];
    if (args.bias) y += read(args.bias + row, count);
    write(args.y + b * args.rows + row, y, count);
}

}  // namespace secateur::SECATEUR_ISA
#endif
