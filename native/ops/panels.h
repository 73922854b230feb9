// Panels of rows, cut into sections of columns. A segment is one row of one section: its values and their columns,
// counted from the section's first. Segments lie in the order [panel, section, row].
#pragma once
#include "linear.h"

namespace secateur {

struct Panels : Linear {
    const void* index;       // uint8 or uint16, [values], column within the section
    const uint16_t* counts;  // [panels, sections, height] values of each segment, 0 for rows past the end
    const int64_t* offsets;  // [panels * sections + 1] first value of each section of each panel
    int64_t height, width;   // rows of a panel, columns of a section
    int index_bytes;

    static constexpr bool kTakesImages = true;
    using Members = Linear::Members::And<&Panels::index, &Panels::counts, &Panels::offsets, &Panels::height,
                                         &Panels::width, &Panels::index_bytes>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "image_slices.h"
#include "slices.h"

namespace secateur::SECATEUR_ISA {

// sums [W * U] += the segment's values times x [width, W * U] at its columns.
template <int W, int U, class I>
SECATEUR_INLINE void segment(const float* values, const I* index, int64_t count, const float* x, float* sums) {
    constexpr int kLanes = W * U, kParts = U >= 4 ? 1 : U >= 2 ? 2 : 4;  // independent sums hide the latency of an FMA
    F<W> a[kParts][U] = {};
    for (int u = 0; u < U; ++u) a[0][u] = load<W>(sums + u * W);
    int64_t i = 0;
    for (; i + kParts <= count; i += kParts) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
            const F<W> v = broadcast<W>(values[i + part]);
            const float* xp = x + int64_t(index[i + part]) * kLanes;
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) a[part][u] += v * load<W>(xp + u * W);
        }
    }
    if constexpr (kParts > 1)
        for (; i < count; ++i) {
            const F<W> v = broadcast<W>(values[i]);
            const float* xp = x + int64_t(index[i]) * kLanes;
            for (int u = 0; u < U; ++u) a[0][u] += v * load<W>(xp + u * W);
        }
    for (int u = 0; u < U; ++u) {
        for (int part = 1; part < kParts; ++part) a[0][u] += a[part][u];
        store<W>(sums + u * W, a[0][u]);
    }
}

template <int W, int U, class T, class I>
void panel(const Panels& args, int64_t at, int64_t sections, int64_t count, const T* values, const float* x,
           float* sums, float* buffer) {
    const I* index = static_cast<const I*>(args.index);
    __builtin_memset(sums, 0, size_t(count * W * U) * sizeof(float));
    for (int64_t section = 0; section < sections; ++section, ++at, x += args.width * W * U) {
        const int64_t first = args.offsets[at];
        const float* v = decoded<T>(values + first, args.offsets[at + 1] - first, buffer);
        const I* j = index + first;
        const T* stored = values + first;
        const uint16_t* counts = args.counts + at * args.height;
        for (int64_t r = 0; r < count; ++r) {
            if constexpr (U <= 2) {  // few products for each value read: memory is what takes the time
                prefetch(stored, 2048);
                if (sizeof(T) == 4) prefetch(stored, 2112);
                prefetch(j, 1024);
                stored += counts[r];
            }
            segment<W, U, I>(v, j, counts[r], x, sums + r * W * U);
            v += counts[r];
            j += counts[r];
        }
    }
}

template <class T, class I> void panels_batch(const Panels& args) {
    const T* values = static_cast<const T*>(args.values);
    const int64_t panels = ceil_div(args.rows, args.height), sections = ceil_div(args.columns, args.width);
    const int64_t decoded_size = sizeof(T) == 4 ? 0 : longest(args.offsets, panels * sections);
    const int64_t mine = ceil_div(args.height * kMaxLanes + decoded_size, 16) * 16;
    float* work = static_cast<float*>(scratch(kWork, args.threads * mine * int64_t(sizeof(float))));
    each_part_and_slice(args, panels, 1, [&](int64_t p, int64_t b, int64_t lanes, const float* x, int64_t thread) {
        float* sums = work + thread * mine;
        float* buffer = sums + args.height * kMaxLanes;
        const int64_t row = p * args.height, count = least(args.height, args.rows - row), at = p * sections;
        if (lanes == 4) panel<4, 1, T, I>(args, at, sections, count, values, x, sums, buffer);
        else if (lanes == kWidth * 4) panel<kWidth, 4, T, I>(args, at, sections, count, values, x, sums, buffer);
        else if (lanes == kWidth * 2) panel<kWidth, 2, T, I>(args, at, sections, count, values, x, sums, buffer);
        else if (lanes == kWidth) panel<kWidth, 1, T, I>(args, at, sections, count, values, x, sums, buffer);
        else if constexpr (kWidth > 8) panel<8, 1, T, I>(args, at, sections, count, values, x, sums, buffer);
        unpack_output(args, sums, lanes, b, row, count);
    });
}

// The panels of a convolution: a slice has up to kPanelVectors vectors of pixels.
constexpr int kPanelVectors = 6;

template <int U, class T, class I>
void pixels_panel(int64_t vectors, const Panels& args, int64_t at, int64_t sections, int64_t count, const T* values,
                  const float* x, float* sums, float* buffer) {
    if constexpr (U > 1)
        if (vectors < U) return pixels_panel<U - 1, T, I>(vectors, args, at, sections, count, values, x, sums, buffer);
    panel<kWidth, U, T, I>(args, at, sections, count, values, x, sums, buffer);
}

template <class T, class I> void panels_pixels(const Panels& args) {
    const T* values = static_cast<const T*>(args.values);
    const int64_t panels = ceil_div(args.rows, args.height), sections = ceil_div(args.columns, args.width);
    const int64_t decoded_size = sizeof(T) == 4 ? 0 : longest(args.offsets, panels * sections);
    const int64_t mine = ceil_div(args.height * kMostPixels + decoded_size, 16) * 16;
    float* work = static_cast<float*>(scratch(kWork, args.threads * mine * int64_t(sizeof(float))));
    each_part_and_pixels(args, *args.image, panels, 1, kPanelVectors, ~0u,
                         [&](int64_t p, const PixelSlice& slice, int64_t thread) {
        float* sums = work + thread * mine;
        const int64_t row = p * args.height, count = least(args.height, args.rows - row);
        pixels_panel<kPanelVectors, T, I>(slice.vectors, args, p * sections, sections, count, values, slice.x, sums,
                                          sums + args.height * kMostPixels);
        unpack_pixels(args, *args.image, slice, sums, row, count);
    });
}

// A segment's values times one row of x. Indexed loads into a vector's lanes beat both gathers and scalar sums.
template <class T, class I> SECATEUR_INLINE float segment_single(const T* v, const I* j, int64_t n, const float* x) {
    F<4> a[2] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part)
            a[part] += load_values<4, T>(v + i + part * 4) * gather4<I>(x, j + i + part * 4);
    float total = sum<4>(a[0] + a[1]);
    for (; i < n; ++i) total += decode(v[i]) * x[j[i]];
    return total;
}

template <class T, class I> void panels_single(const Panels& args) {
    const int64_t panels = ceil_div(args.rows, args.height), sections = ceil_div(args.columns, args.width);
    each_in_parallel(args.threads, panels, 1, [&](int64_t panel, int64_t) {
        const int64_t row = panel * args.height, count = least(args.height, args.rows - row);
        for (int64_t section = 0; section < sections; ++section) {
            const int64_t at = panel * sections + section;
            const T* v = static_cast<const T*>(args.values) + args.offsets[at];
            const I* j = static_cast<const I*>(args.index) + args.offsets[at];
            const uint16_t* counts = args.counts + at * args.height;
            const float* x = args.x + section * args.width;
            for (int64_t r = 0; r < count; ++r) {
                const float total = segment_single<T, I>(v, j, counts[r], x);
                float& y = args.y[row + r];
                y = section ? y + total : total;
                v += counts[r];
                j += counts[r];
            }
        }
        for (int64_t r = row; r < row + count; ++r) args.y[r] = finish(args, r, args.y[r]);
    });
}

template <class T, class I> void panels_typed(const Panels& args) {
    if (args.image) each_group_of_images(args, [](const Panels& part) { panels_pixels<T, I>(part); });
    else if (args.batch == 1) panels_single<T, I>(args);
    else panels_batch<T, I>(args);
}

inline void panels(const Panels& args) {
    with_type(args.value_type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (args.index_bytes == 1) panels_typed<T, uint8_t>(args);
        else panels_typed<T, uint16_t>(args);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
