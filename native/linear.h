// y = x W^T + b: the arguments that all layouts of a weight share, and the code that their kernels share.
#pragma once
#include <cstdint>

#include "fields.h"
#include "image.h"

namespace secateur {

// y [batch, rows] = x [batch, columns] times the transposed weight, times the scale of each row, plus the bias. All
// matrices are row-major. Each layout adds where its values stand.
struct Linear {
    // The weight.
    const void* values;  // readable 16 elements past the end, because kernels load whole vectors
    const float* scale;  // [rows], what int8 values are multiplied by; or null
    int64_t rows, columns;
    int value_type;  // see with_type
    // One call.
    const float* x;
    float* y;
    const float* bias;  // [rows] or null
    int64_t batch;
    int threads;
    const Image* image = nullptr;  // the batch is the pixels of images, for kernels that take these; else null

    static constexpr bool kTakesImages = false;
    using Members = Fields<&Linear::values, &Linear::scale, &Linear::rows, &Linear::columns, &Linear::value_type>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "parts.h"
#include "scratch.h"
#include "simd/vector.h"

namespace secateur::SECATEUR_ISA {

inline float finish(const Linear& args, int64_t row, float sum) {
    if (args.scale) sum *= args.scale[row];
    return args.bias ? sum + args.bias[row] : sum;
}

// A copy of x with rows at a stride that is a multiple of 64: zeros up to the stride, and kPad readable floats after
// the last row. Kernels that read 64 columns at a time, or load whole vectors near the end of a row, need it.
constexpr int64_t kPad = 64;
inline const float* padded_input(const Linear& args, int64_t& stride) {
    stride = ceil_div(args.columns, 64) * 64;
    float* x = static_cast<float*>(scratch(kInput, (args.batch * stride + kPad) * int64_t(sizeof(float))));
    for (int64_t b = 0; b < args.batch; ++b) {
        __builtin_memcpy(x + b * stride, args.x + b * args.columns, size_t(args.columns) * sizeof(float));
        __builtin_memset(x + b * stride + args.columns, 0, size_t(stride - args.columns) * sizeof(float));
    }
    __builtin_memset(x + args.batch * stride, 0, size_t(kPad) * sizeof(float));
    return x;
}

// Values as float32: the stored ones, or a decoded copy in `buffer`.
template <class T> inline const float* decoded(const T* values, int64_t count, float* buffer) {
    if constexpr (sizeof(T) == 4) return values;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store<kWidth>(buffer + i, load_values<kWidth, T>(values + i));
    for (; i < count; ++i) buffer[i] = decode(values[i]);
    return buffer;
}

// The largest difference of neighbours among the `count` + 1 offsets.
inline int64_t longest(const int64_t* offsets, int64_t count) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i)
        found = offsets[i + 1] - offsets[i] > found ? offsets[i + 1] - offsets[i] : found;
    return found;
}

}  // namespace secateur::SECATEUR_ISA
#endif
