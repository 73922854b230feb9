// Dense tiles of any size, cut into strips of 16, 8, 4, 2 or 1 rows: values [strip, tile, width, strip rows] in each
// row of tiles.
#pragma once
#include "linear.h"

namespace secateur {

struct Tiles : Linear {
    const int32_t* tile_columns;  // [tiles] which column of tiles each stands in
    const int64_t* first_tiles;   // [rows / height + 1] first tile of each row of tiles
    int64_t height, width;        // of a tile

    static constexpr bool kTakesImages = true;
    using Members = Linear::Members::And<&Tiles::tile_columns, &Tiles::first_tiles, &Tiles::height, &Tiles::width>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "image_slices.h"
#include "slices.h"

namespace secateur::SECATEUR_ISA {

// sums [H, W * U] of [H, W * L] = H rows of a strip, from values [tile, width, skip], times x [columns, W * L].
template <int W, int U, int H, int L>
SECATEUR_INLINE void strip_batch(const float* v, const int32_t* columns, int64_t tiles, int64_t width, int64_t skip,
                                 const float* x, float* sums) {
    // Enough independent sums to hide the latency of an FMA.
    constexpr int kParts = H * U >= 8 ? 1 : H * U >= 4 ? 2 : 4;
    F<W> a[kParts][H][U] = {};
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const float* xp = x + int64_t(columns[tile]) * width * (W * L);
        const auto column = [&](F<W>(&sum)[H][U]) {
            F<W> xs[U];
#pragma GCC unroll 8
            for (int u = 0; u < U; ++u) xs[u] = load<W>(xp + u * W);
#pragma GCC unroll 8
            for (int h = 0; h < H; ++h) {
                const F<W> value = broadcast<W>(v[h]);
#pragma GCC unroll 8
                for (int u = 0; u < U; ++u) sum[h][u] += value * xs[u];
            }
            xp += W * L;
            v += skip;
        };
        int64_t k = 0;
        for (; k + kParts <= width; k += kParts)
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) column(a[part]);
        for (; k < width; ++k) column(a[0]);
    }
    for (int h = 0; h < H; ++h)
        for (int u = 0; u < U; ++u) {
            for (int part = 1; part < kParts; ++part) a[0][h][u] += a[part][h][u];
            store<W>(sums + (h * L + u) * W, a[0][h][u]);
        }
}

// The rows of a strip and the lanes of a slice, in parts whose sums fit the registers.
template <int W, int U, int H>
inline void strip_part(const float* v, const int32_t* columns, int64_t tiles, int64_t width, int64_t skip,
                       const float* x, float* sums) {
    constexpr int kSums = kRegisters / 2;  // the other half holds inputs and values
    constexpr int kU = kSums == 8 && U == 4 ? 2 : U, kH = kSums / kU < H ? kSums / kU : H;
    for (int h = 0; h < H; h += kH)
        for (int u = 0; u < U; u += kU)
            strip_batch<W, kU, kH, U>(v + h, columns, tiles, width, skip, x + u * W, sums + (h * U + u) * W);
}

template <int W, int U>
inline void strip_rows(int64_t height, const float* v, const int32_t* columns, int64_t tiles, int64_t width,
                       const float* x, float* sums) {
    switch (height) {
        case 16:
            strip_part<W, U, 8>(v, columns, tiles, width, 16, x, sums);
            return strip_part<W, U, 8>(v + 8, columns, tiles, width, 16, x, sums + 8 * W * U);
        case 8: return strip_part<W, U, 8>(v, columns, tiles, width, 8, x, sums);
        case 4: return strip_part<W, U, 4>(v, columns, tiles, width, 4, x, sums);
        case 2: return strip_part<W, U, 2>(v, columns, tiles, width, 2, x, sums);
        default: return strip_part<W, U, 1>(v, columns, tiles, width, 1, x, sums);
    }
}

inline int64_t strip_height(int64_t left) {
    int64_t height = 16;
    while (height > left) height /= 2;
    return height;
}

// sums [height, lanes] of one row of tiles. What is decoded stands behind the sums, which have room for `most` lanes.
template <class T>
void tile_row(const Tiles& args, int64_t i, int64_t lanes, int64_t most, const float* x, float* sums) {
    const int64_t first = args.first_tiles[i], tiles = args.first_tiles[i + 1] - first;
    const int64_t size = args.height * args.width;
    const float* v =
        decoded<T>(static_cast<const T*>(args.values) + first * size, tiles * size, sums + args.height * most);
    const int32_t* columns = args.tile_columns + first;
    for (int64_t done = 0, height; done < args.height; done += height) {
        height = strip_height(args.height - done);
        float* to = sums + done * lanes;
        if (lanes == 4) strip_rows<4, 1>(height, v, columns, tiles, args.width, x, to);
        else if (lanes == kWidth * 4) strip_rows<kWidth, 4>(height, v, columns, tiles, args.width, x, to);
        else if (lanes == kWidth * 2) strip_rows<kWidth, 2>(height, v, columns, tiles, args.width, x, to);
        else if (lanes == kWidth) strip_rows<kWidth, 1>(height, v, columns, tiles, args.width, x, to);
        else if constexpr (kWidth > 8) strip_rows<8, 1>(height, v, columns, tiles, args.width, x, to);
        v += tiles * args.width * height;
    }
}

template <class T> void tiles_batch(const Tiles& args) {
    const int64_t tile_rows = args.rows / args.height, size = args.height * args.width;
    const int64_t decoded_size = sizeof(T) == 4 ? 0 : longest(args.first_tiles, tile_rows) * size;
    const int64_t mine = ceil_div(args.height * kMaxLanes + decoded_size, 16) * 16;
    float* work = static_cast<float*>(scratch(kWork, args.threads * mine * int64_t(sizeof(float))));
    const int64_t together = ceil_div(64, args.height);  // threads that share a cache line of y wait for each other
    if (args.image) {
        const uint32_t sizes = 1u << 1 | 1u << 2 | 1u << 4;
        each_part_and_pixels(args, *args.image, tile_rows, 1, kMaxLanes / kWidth, sizes,
                             [&](int64_t i, const PixelSlice& slice, int64_t thread) {
            float* sums = work + thread * mine;
            tile_row<T>(args, i, slice.vectors * kWidth, kMaxLanes, slice.x, sums);
            unpack_pixels(args, *args.image, slice, sums, i * args.height, args.height);
        });
        return;
    }
    each_part_and_slice(args, tile_rows, together,
                        [&](int64_t i, int64_t b, int64_t lanes, const float* x, int64_t thread) {
        float* sums = work + thread * mine;
        tile_row<T>(args, i, lanes, kMaxLanes, x, sums);
        unpack_output(args, sums, lanes, b, i * args.height, args.height);
    });
}

// out [H] = H rows of a strip times one row of x, W / H columns at a time. A column's values lie `skip` apart.
template <class T, int W, int H>
SECATEUR_INLINE void strip_single(const T* v, int64_t skip, const int32_t* columns, int64_t tiles, int64_t width,
                                  const float* x, float* out) {
    constexpr int kColumns = W / H;
    F<W> sums[4] = {};
    float rest[H] = {};
    // Inlined, so that `first` is a constant and the sums stay in registers.
    const auto add = [&](int64_t tile, int first) SECATEUR_INLINED {
        const float* xp = x + int64_t(columns[tile]) * width;
        int64_t k = 0;
        for (; k + 4 * kColumns <= width; k += 4 * kColumns, v += 4 * kColumns * skip)
#pragma GCC unroll 4
            for (int part = 0; part < 4; ++part)
                sums[part] += load_values<W, T>(v + part * kColumns * skip) * spread<W, H>(xp + k + part * kColumns);
        for (; k + kColumns <= width; k += kColumns, v += kColumns * skip)
            sums[first] += load_values<W, T>(v) * spread<W, H>(xp + k);
        if constexpr (kColumns > 1)
            for (; k < width; ++k, v += skip)
                for (int h = 0; h < H; ++h) rest[h] += decode(v[h]) * xp[k];
    };
    int64_t tile = 0;
    for (; tile + 4 <= tiles; tile += 4) {
        add(tile, 0);
        add(tile + 1, 1);
        add(tile + 2, 2);
        add(tile + 3, 3);
    }
    for (; tile < tiles; ++tile) add(tile, 0);
    const F<W> total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int h = 0; h < H; ++h) {
        out[h] = rest[h];
        for (int k = 0; k < kColumns; ++k) out[h] += total[k * H + h];
    }
}

// The same with the widest vector that a tile fills.
template <class T, int H>
SECATEUR_INLINE void strip_single_any(const T* v, int64_t skip, const int32_t* columns, int64_t tiles, int64_t width,
                                      const float* x, float* out) {
    if constexpr (kWidth >= 16 && H <= 16)
        if (16 / H <= width && skip == H) return strip_single<T, 16, H>(v, skip, columns, tiles, width, x, out);
    if constexpr (kWidth >= 8 && H <= 8)
        if (8 / H <= width && (skip == H || H == 8))
            return strip_single<T, 8, H>(v, skip, columns, tiles, width, x, out);
    if constexpr (H <= 4)
        if (4 / H <= width) return strip_single<T, 4, H>(v, skip, columns, tiles, width, x, out);
    for (int64_t h = 0; h < H; ++h) out[h] = 0.0f;
    for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t k = 0; k < width; ++k, v += skip)
            for (int64_t h = 0; h < H; ++h) out[h] += decode(v[h]) * x[columns[tile] * width + k];
}

// The H rows of a strip, at most kWidth at a time.
template <class T, int H>
SECATEUR_INLINE void strip_single_rows(const T* v, const int32_t* columns, int64_t tiles, int64_t width, const float* x,
                                       float* out) {
    constexpr int kPart = kWidth < H ? kWidth : H;
    for (int first = 0; first < H; first += kPart)
        strip_single_any<T, kPart>(v + first, H, columns, tiles, width, x, out + first);
}

template <class T> void tiles_single(const Tiles& args) {
    const int64_t tile_rows = args.rows / args.height;
    int64_t stride;
    const float* x = padded_input(args, stride);
    const int64_t together = ceil_div(64, args.height);  // threads that share a cache line of y wait for each other
    each_in_parallel(args.threads, tile_rows, together, [&](int64_t i, int64_t) {
        const int64_t first = args.first_tiles[i], tiles = args.first_tiles[i + 1] - first;
        const int32_t* columns = args.tile_columns + first;
        for (int64_t b = 0; b < args.batch; ++b) {
            const T* v = static_cast<const T*>(args.values) + first * args.height * args.width;
            const float* xb = x + b * stride;
            for (int64_t done = 0, height; done < args.height; done += height) {
                height = strip_height(args.height - done);
                float out[16];
                switch (height) {
                    case 16: strip_single_rows<T, 16>(v, columns, tiles, args.width, xb, out); break;
                    case 8: strip_single_rows<T, 8>(v, columns, tiles, args.width, xb, out); break;
                    case 4: strip_single_rows<T, 4>(v, columns, tiles, args.width, xb, out); break;
                    case 2: strip_single_rows<T, 2>(v, columns, tiles, args.width, xb, out); break;
                    default: strip_single_rows<T, 1>(v, columns, tiles, args.width, xb, out);
                }
                for (int64_t r = 0; r < height; ++r) {
                    const int64_t row = i * args.height + done + r;
                    args.y[b * args.rows + row] = finish(args, row, out[r]);
                }
                v += tiles * args.width * height;
            }
        }
    });
}

inline void tiles(const Tiles& args) {
    with_type(args.value_type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if (args.image) each_group_of_images(args, [](const Tiles& part) { tiles_batch<T>(part); });
        else if (args.batch < 3) tiles_single<T>(args);
        else tiles_batch<T>(args);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
