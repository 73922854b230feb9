// The kept tiles of a weight as bytes, for inputs that are rounded to bytes. A tile is four neighbours of one row (1x4),
// four neighbours of four rows (4x4), or four kept columns, anywhere, of four rows (4x1): values [tile, height, 4].
#pragma once
#include "linear.h"

namespace secateur {

struct Int8Tiles : Linear {
    const int32_t* sums;         // [rows] the sum of the bytes of each row
    const uint16_t* places;      // [tiles] the word of four columns; for 4x1 [tiles, 4] the columns
    const int64_t* first_tiles;  // [ceil(rows / height) + 1] first tile of each row of tiles
    int64_t height, width;       // 1x4, 4x4 or 4x1

    using Members = Linear::Members::And<&Int8Tiles::sums, &Int8Tiles::places, &Int8Tiles::first_tiles,
                                         &Int8Tiles::height, &Int8Tiles::width>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "rounded_slices.h"

namespace secateur::SECATEUR_ISA {

constexpr int64_t kTileRows = 16;  // whose outputs are written together

// How a tile finds its inputs: four neighbours, or four columns anywhere, whose lanes lie as they come or for `interleave`.
enum class Find { kWord, kColumns, kInterleaved };

constexpr int64_t kLeastSlice = 4;  // rows of x from which on they lie side by side

// sums [H, W * N] of H rows of tiles, `skip` bytes apart, times a slice.
template <int W, int N, int H, Find find>
SECATEUR_INLINE void int8_tiles_part(const int8_t* v, int64_t skip, const uint16_t* places, int64_t tiles,
                                     const uint8_t* x, int64_t lanes, int32_t* sums) {
    // Enough independent sums to hide the latency of a dot product.
    constexpr int kParts = H * N >= 8 ? 1 : H * N >= 4 ? 2 : 4;
    I<W> a[kParts][H][N] = {};
    const auto add = [&](I<W>(&sum)[H][N]) SECATEUR_INLINED {
        U<W> xs[N];
        if constexpr (find == Find::kWord) {
            const uint8_t* at = x + int64_t(*places++) * lanes * 4;
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) xs[n] = load_words<W>(at + n * W * 4);
        } else {
            const uint8_t* const c[4] = {x + places[0] * lanes, x + places[1] * lanes, x + places[2] * lanes,
                                         x + places[3] * lanes};
            places += 4;
            if constexpr (find == Find::kInterleaved) interleave<W>(c, xs);
            else
#pragma GCC unroll 4
                for (int n = 0; n < N; ++n) {
                    const uint8_t* const part[4] = {c[0] + n * W, c[1] + n * W, c[2] + n * W, c[3] + n * W};
                    xs[n] = columns_of<W>(part);
                }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            uint32_t word;
            __builtin_memcpy(&word, v + h * 4, 4);
            const U<W> codes = U<W>{} + word;
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[h][n] = dot(sum[h][n], xs[n], codes);
        }
        v += skip;
    };
    int64_t tile = 0;
    for (; tile + kParts <= tiles; tile += kParts)
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) add(a[part]);
    for (; tile < tiles; ++tile) add(a[0]);
    for (int h = 0; h < H; ++h)
        for (int n = 0; n < N; ++n) {
            for (int part = 1; part < kParts; ++part) a[0][h][n] += a[part][h][n];
            __builtin_memcpy(sums + h * lanes + n * W, &a[0][h][n], sizeof(I<W>));
        }
}

// The same in parts whose sums fit the registers.
template <int W, int N, int H, Find find>
SECATEUR_INLINE void int8_tiles_row(const int8_t* v, const uint16_t* places, int64_t tiles, const uint8_t* x,
                                    int64_t lanes, int32_t* sums) {
    constexpr int kSums = kRegisters / 2;  // the other half holds inputs and codes
    constexpr int kN = find != Find::kInterleaved && H * N > kSums ? kSums / H : N, kH = kSums / kN < H ? kSums / kN : H;
    for (int h = 0; h < H; h += kH)
        for (int n = 0; n < N; n += kN)
            int8_tiles_part<W, kN, kH, find>(v + h * 4, H * 4, places, tiles, x + n * W * (find == Find::kWord ? 4 : 1),
                                             lanes, sums + h * lanes + n * W);
}

template <int H, Find find, Find wide>
SECATEUR_INLINE void int8_tiles_lanes(const int8_t* v, const uint16_t* places, int64_t tiles, const uint8_t* x,
                                      int64_t lanes, int32_t* sums) {
    if (lanes == kWidth * 4) return int8_tiles_row<kWidth, 4, H, wide>(v, places, tiles, x, lanes, sums);
    if constexpr (kWidth == 16 && find != wide) {
        if (lanes == 32) return int8_tiles_row<8, 4, H, wide>(v, places, tiles, x, lanes, sums);
    } else {
        if (lanes == kWidth * 2) return int8_tiles_row<kWidth, 2, H, find>(v, places, tiles, x, lanes, sums);
    }
    if (lanes == kWidth) return int8_tiles_row<kWidth, 1, H, find>(v, places, tiles, x, lanes, sums);
    if constexpr (kWidth == 16) int8_tiles_row<8, 1, H, find>(v, places, tiles, x, lanes, sums);
}

// The inputs of the tiles of one vector, from one row of x: each word in H lanes.
template <int H, bool Columns> SECATEUR_INLINE Words single_inputs(const uint8_t* x, const uint16_t* places) {
    const auto word = [&](int tile) SECATEUR_INLINED {
        if constexpr (Columns) {
            const uint16_t* place = places + tile * 4;
            return uint32_t(x[place[0]]) | uint32_t(x[place[1]]) << 8 | uint32_t(x[place[2]]) << 16 |
                   uint32_t(x[place[3]]) << 24;
        } else {
            uint32_t found;
            __builtin_memcpy(&found, x + int64_t(places[tile]) * 4, 4);
            return found;
        }
    };
    const auto four = [&](int tile) SECATEUR_INLINED {
        return U<4>{word(tile), word(tile + 1), word(tile + 2), word(tile + 3)};
    };
    if constexpr (kWidth / H == 1) return Words{} + word(0);
    else if constexpr (kWidth / H == 2) return quadruple<kWidth>(U<4>{word(0), word(1)});
    else if constexpr (H == 4) return quadruple<kWidth>(four(0));
    else if constexpr (kWidth == 4) return four(0);
    else if constexpr (kWidth == 8) return join<8>(four(0), four(4));
    else return join<16>(join<8>(four(0), four(4)), join<8>(four(8), four(12)));
}

// out [H] = a row of tiles times one row of x.
template <int H, bool Columns>
SECATEUR_INLINE void int8_tiles_single(const int8_t* v, const uint16_t* places, int64_t tiles, const uint8_t* x,
                                       int32_t* out) {
    constexpr int kTogether = kWidth / H;  // tiles in a vector
    Whole sums[2] = {};
    const auto add = [&](int64_t tile, Whole& to, Words keep) SECATEUR_INLINED {
        to = dot(to, single_inputs<H, Columns>(x, places + tile * (Columns ? 4 : 1)),
                 load_words<kWidth>(v + tile * H * 4) & keep);
    };
    const Words all = ~Words{};
    int64_t tile = 0;
    for (; tile + 2 * kTogether <= tiles; tile += 2 * kTogether) {
        add(tile, sums[0], all);
        add(tile + kTogether, sums[1], all);
    }
    for (; tile < tiles; tile += kTogether)
        add(tile, sums[0], first_lanes(int(least(kTogether, tiles - tile)) * H));  // values of other rows follow
    const Whole total = sums[0] + sums[1];
    I<4> four = {};
    for (int i = 0; i < kWidth; i += 4) four += (I<4>)load_words<4>(reinterpret_cast<const char*>(&total) + i * 4);
    if constexpr (H == 4) __builtin_memcpy(out, &four, sizeof four);
    else out[0] = four[0] + four[1] + four[2] + four[3];
}

template <int H, Find find, Find wide> inline void int8_tiles_of(const Int8Tiles& args) {
    constexpr bool kColumns = find == Find::kColumns;
    constexpr int64_t kTogether = kTileRows / H;  // rows of tiles
    const int64_t down = ceil_div(args.rows, H), parts = ceil_div(args.rows, kTileRows);
    const int8_t* values = static_cast<const int8_t*>(args.values);
    const auto each_row = [&](int64_t part, auto f) SECATEUR_INLINED {
        for (int64_t i = part * kTogether; i < least(down, (part + 1) * kTogether); ++i) {
            const int64_t first = args.first_tiles[i], row = i - part * kTogether;
            f(row * H, values + first * H * 4, args.places + first * (kColumns ? 4 : 1), args.first_tiles[i + 1] - first);
        }
    };
    if (args.batch < kLeastSlice) {
        const Rounded x = rounded_input(args);
        each_in_parallel(args.threads, parts, 1, [&](int64_t part, int64_t) {
            for (int64_t b = 0; b < args.batch; ++b) {
                alignas(64) int32_t sums[kTileRows] = {};
                each_row(part, [&](int64_t row, const int8_t* v, const uint16_t* places, int64_t tiles) SECATEUR_INLINED {
                    int8_tiles_single<H, kColumns>(v, places, tiles, x.bytes + b * x.stride, sums + row);
                });
                for (int64_t row = part * kTileRows, i = 0; i < kTileRows && row + i < args.rows; i += kWidth)
                    write_rounded(args, args.sums, x, b, row + i, (Whole)load_words<kWidth>(sums + i));
            }
        });
        return;
    }
    int32_t* work = static_cast<int32_t*>(scratch(kWork, args.threads * kTileRows * kMostLanes * 4));
    const Order order = kColumns ? Order::kColumns : Order::kWords;
    each_part_and_rounded_slice(args, order, parts, [&](int64_t part, const Slice& slice, int64_t thread) {
        int32_t* sums = work + thread * kTileRows * kMostLanes;
        each_row(part, [&](int64_t row, const int8_t* v, const uint16_t* places, int64_t tiles) SECATEUR_INLINED {
            int8_tiles_lanes<H, find, wide>(v, places, tiles, slice.bytes, slice.lanes, sums + row * slice.lanes);
        });
        const int64_t row = part * kTileRows;
        unpack_rounded(args, args.sums, slice, sums, row, least(kTileRows, args.rows - row));
    });
}

inline void int8_tiles(const Int8Tiles& args) {
    if (args.height == 1) return int8_tiles_of<1, Find::kWord, Find::kWord>(args);
    if (args.width == 4) return int8_tiles_of<4, Find::kWord, Find::kWord>(args);
    int8_tiles_of<4, Find::kColumns, Find::kInterleaved>(args);
}

}  // namespace secateur::SECATEUR_ISA
#endif
