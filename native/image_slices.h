// Slices of a batch of pixels, [columns, lanes], as the kernels of panels and tiles take them, cut out of images whose
// pixels lie side by side already. Nothing is transposed. A slice has each pixel as often as the kernel covers it: its
// rows are aligned that way, which loads at shifted places are not.
#pragma once
#include "image.h"
#include "linear.h"

namespace secateur::SECATEUR_ISA {

constexpr int64_t kMostPixels = 8 * kWidth;  // of a slice

// Calls f(arguments) for one group of images after the other, so that their copy with padding takes little memory.
template <class Arguments, class Function> inline void each_group_of_images(const Arguments& args, Function f) {
    constexpr int64_t kMost = 1 << 20;  // floats of the copy
    const Image& whole = *args.image;
    const int64_t channels = args.columns / (whole.kernel_down * whole.kernel_across);
    const int64_t plane = whole.height * whole.width;
    int64_t padded = channels * (whole.height + 2 * whole.padding_down) * (whole.width + 2 * whole.padding_across);
    if (padded == channels * plane) padded = 0;  // there is no copy
    const int64_t groups = ceil_div(whole.images * padded, kMost), each = ceil_div(whole.images, groups ? groups : 1);
    for (int64_t first = 0; first < whole.images; first += each) {
        Image image = whole;
        Arguments part = args;
        image.images = least(each, whole.images - first);
        part.image = &image;
        part.batch = image.images * image.down * image.across;
        part.x += first * channels * plane;
        part.y += first * args.rows * image.down * image.across;
        f(part);
    }
}

// Where the pixels of x are, with the padding around them.
struct Planes {
    const float *x, *end;  // of [images, channels, height, width]; no load may go beyond the end
    int64_t height, width, channels, kernel_down, kernel_across, step_down, step_across;  // steps of the kernel
    int64_t stride_down, stride_across, down, across;
};

// Pixels side by side in a slice whose inputs are at equal distances.
struct PixelRun {
    int64_t lane, count, from;  // the first input is at this place of the first channel
};

inline Planes planes_of(const Linear& args, const Image& image) {
    const int64_t channels = args.columns / (image.kernel_down * image.kernel_across);
    Planes to = {args.x,
                 args.x + image.images * channels * image.height * image.width,
                 image.height,
                 image.width,
                 channels,
                 image.kernel_down,
                 image.kernel_across,
                 image.dilation_down,
                 image.dilation_across,
                 image.stride_down,
                 image.stride_across,
                 image.down,
                 image.across};
    const int64_t above = image.padding_down, left = image.padding_across;
    if (above || left) {
        to.height += 2 * above;
        to.width += 2 * left;
        const int64_t plane = to.height * to.width, count = image.images * channels;
        float* copy = static_cast<float*>(scratch(kImage, (count * plane + 2 * kWidth) * int64_t(sizeof(float))));
        each_in_parallel(args.threads, count, kEqually, [&](int64_t i, int64_t) {
            float* row = copy + i * plane;
            const float* from = args.x + i * image.height * image.width;
            __builtin_memset(row, 0, size_t(plane) * sizeof(float));
            row += above * to.width + left;
            for (int64_t y = 0; y < image.height; ++y, row += to.width, from += image.width)
                __builtin_memcpy(row, from, size_t(image.width) * sizeof(float));
        });
        __builtin_memset(copy + count * plane, 0, 2 * kWidth * sizeof(float));
        to.x = copy;
        to.end = copy + count * plane + 2 * kWidth;
    }
    if (to.stride_down == 1 && to.stride_across == 1 && to.down == to.height && to.across == to.width) {
        to.width *= to.height;  // the kernel has one position: a plane is one long row
        to.across = to.width;
        to.height = to.down = 1;
    }
    return to;
}

// The runs of the pixels from `start` on, up to `last`.
inline int64_t find_runs(const Planes& planes, int64_t start, int64_t last, PixelRun* runs) {
    int64_t count = 0;
    for (int64_t pixel = start; pixel < last;) {
        const int64_t row = pixel / planes.across, at = pixel % planes.across;  // row counts through all images
        const int64_t length = least(planes.across - at, last - pixel);
        const int64_t image = row / planes.down, y = row % planes.down;
        const int64_t from = image * planes.channels * planes.height * planes.width +
                             y * planes.stride_down * planes.width + at * planes.stride_across;
        runs[count++] = {pixel - start, length, from};
        pixel += length;
    }
    return count;
}

// Every second of the floats at p.
template <int W> SECATEUR_INLINE F<W> load_even(const float* p) {
    const F<W> a = load<W>(p), b = load<W>(p + W);
    if constexpr (W == 4) return __builtin_shufflevector(a, b, 0, 2, 4, 6);
    else if constexpr (W == 8) return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    else return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

template <int S>
SECATEUR_INLINE void copy_run(const float* from, int64_t stride, int64_t count, int64_t room, const float* end,
                              float* to) {
    int64_t i = 0;
    if constexpr (S > 0)  // what is written beyond the run is overwritten by the next one, or stands in no pixel's lane
        for (; i < count && i + kWidth <= room && from + (i + kWidth) * S <= end; i += kWidth) {
            if constexpr (S == 1) store<kWidth>(to + i, load<kWidth>(from + i));
            else store<kWidth>(to + i, load_even<kWidth>(from + 2 * i));
        }
    for (; i < count; ++i) to[i] = from[i * stride];
}

// Copies the columns of the channels from `first` to `last` into a slice.
template <int S>
inline void pack_channels(const Planes& planes, const PixelRun* runs, int64_t count, int64_t lanes, int64_t first,
                          int64_t last, float* slice) {
    const int64_t positions = planes.kernel_down * planes.kernel_across;
    const int64_t used = runs[count - 1].lane + runs[count - 1].count;
    float* to = slice + first * positions * lanes;
    for (int64_t c = first; c < last; ++c)
        for (int64_t ky = 0; ky < planes.kernel_down; ++ky)
            for (int64_t kx = 0; kx < planes.kernel_across; ++kx, to += lanes) {
                const float* from =
                    planes.x + (c * planes.height + ky * planes.step_down) * planes.width + kx * planes.step_across;
                if constexpr (S == 1)  // the next slice of a large image is on other pages, which no processor foresees
                    if (positions == 1)
                        for (int64_t lane = lanes; lane < 2 * lanes; lane += 16)
                            __builtin_prefetch(from + runs[0].from + lane);
                for (int64_t r = 0; r < count; ++r)
                    copy_run<S>(from + runs[r].from, planes.stride_across, runs[r].count, lanes - runs[r].lane,
                                planes.end, to + runs[r].lane);
                for (int64_t lane = used; lane < lanes; ++lane) to[lane] = 0;
            }
}

inline void pack_pixels(const Planes& planes, const PixelRun* runs, int64_t count, int64_t lanes, int64_t first,
                        int64_t last, float* slice) {
    if (planes.stride_across == 1) pack_channels<1>(planes, runs, count, lanes, first, last, slice);
    else if (planes.stride_across == 2) pack_channels<2>(planes, runs, count, lanes, first, last, slice);
    else pack_channels<0>(planes, runs, count, lanes, first, last, slice);
}

// A slice of pixels: [columns, vectors * kWidth]. The lanes from `count` on are zeros and belong to no pixel: they may
// be the places of another slice's pixels.
struct PixelSlice {
    const float* x;
    int64_t start, count, vectors;  // its first pixel, and how many
};

// As each_part_and_slice for pixels: calls f(part, slice, thread). A slice has `most` vectors, or fewer if `sizes`
// allows: bit u says that a kernel exists for u vectors.
template <class Function>
inline void each_part_and_pixels(const Linear& args, const Image& image, int64_t parts, int64_t together, int64_t most,
                                 uint32_t sizes, Function f) {
    const auto lanes_of = [&](int64_t vectors) {
        while (!(sizes >> vectors & 1)) ++vectors;
        return vectors * kWidth;
    };
    const Planes planes = planes_of(args, image);
    const int64_t total = ceil_div(args.batch, kWidth);
    int64_t slices = ceil_div(total, most);
    // Threads get equal shares of a multiple of four. The slices decide in which order a kernel adds, so they must not
    // depend on the number of threads.
    if (slices > 2) slices = least(total, ceil_div(slices, 4) * 4);
    const int64_t each = args.columns * lanes_of(ceil_div(total, slices));
    const auto first_vector = [&](int64_t i) { return i * total / slices; };
    const auto pixels = [&](int64_t i, int64_t& count, PixelRun* runs) {
        const int64_t start = first_vector(i) * kWidth, last = least(args.batch, first_vector(i + 1) * kWidth);
        count = find_runs(planes, start, last, runs);
    };
    const auto run = [&](int64_t part, int64_t i, const float* x, int64_t thread) {
        const int64_t lanes = lanes_of(first_vector(i + 1) - first_vector(i)), start = first_vector(i) * kWidth;
        f(part, PixelSlice{x, start, least(args.batch, first_vector(i + 1) * kWidth) - start, lanes / kWidth}, thread);
    };
    const bool own = slices >= 2 * args.threads || slices % args.threads == 0;
    float* x = static_cast<float*>(scratch(kInput, (own ? args.threads : slices) * each * int64_t(sizeof(float))));
    if (own) {
        const int64_t neighbours = slices < 16 * args.threads ? 1 : slices / (8 * args.threads);
        each_in_parallel(args.threads, slices, neighbours, [&](int64_t i, int64_t thread) {
            PixelRun runs[kMostPixels];
            int64_t count;
            pixels(i, count, runs);
            float* slice = x + thread * each;
            const int64_t lanes = lanes_of(first_vector(i + 1) - first_vector(i));
            pack_pixels(planes, runs, count, lanes, 0, planes.channels, slice);
            for (int64_t part = 0; part < parts; ++part) run(part, i, slice, thread);
        });
        return;
    }
    const int64_t groups = ceil_div(planes.channels, 16);
    each_in_parallel(args.threads, slices * groups, kEqually, [&](int64_t at, int64_t) {
        PixelRun runs[kMostPixels];
        const int64_t i = at / groups, first = at % groups * 16;
        int64_t count;
        pixels(i, count, runs);
        pack_pixels(planes, runs, count, lanes_of(first_vector(i + 1) - first_vector(i)), first,
                    least(planes.channels, first + 16), x + i * each);
    });
    each_in_parallel(args.threads, parts, together, [&](int64_t part, int64_t thread) {
        for (int64_t i = 0; i < slices; ++i) run(part, i, x + i * each, thread);
    });
}

// Writes sums [count, lanes] of a slice to the channels of y from `row` on.
inline void unpack_pixels(const Linear& args, const Image& image, const PixelSlice& slice, const float* sums,
                          int64_t row, int64_t count) {
    const int64_t plane = image.down * image.across, lanes = slice.vectors * kWidth;
    for (int64_t done = 0, length; done < slice.count; done += length) {
        const int64_t at = (slice.start + done) % plane, image_number = (slice.start + done) / plane;
        length = least(plane - at, slice.count - done);
        float* y = args.y + (image_number * args.rows + row) * plane + at;
        const float* from = sums + done;
        for (int64_t r = 0; r < count; ++r, y += plane, from += lanes) {
            const float scale = args.scale ? args.scale[row + r] : 1.0f, bias = args.bias ? args.bias[row + r] : 0.0f;
            int64_t i = 0;
            for (; i + kWidth <= length; i += kWidth) store<kWidth>(y + i, load<kWidth>(from + i) * scale + bias);
            for (; i < length; ++i) y[i] = from[i] * scale + bias;
        }
    }
}

}  // namespace secateur::SECATEUR_ISA
