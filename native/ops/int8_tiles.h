// The kept tiles of a weight as bytes. A tile is four neighbours of one row (1x4), four neighbours of four rows (4x4),
// or four kept columns, anywhere, of four rows (4x1): values [tile, height, 4]. The inputs are rounded to bytes.
//
// Tiles stand by panels of rows, in a panel by sections of columns, in a section by rows. All rows of a panel read the
// inputs of one section before those of the next, so that these stay in the nearest cache.
#pragma once
#include "linear.h"

namespace secateur {

struct Int8Tiles : Linear {
    const int32_t* sums;         // [rows] the sum of the bytes of each row
    const uint16_t* places;      // [tiles] the word of four columns; for 4x1 [tiles, 4] the columns
    const int64_t* first_tiles;  // [panels, sections, panel / height] and the last: first tile of each row of a section
    int64_t height, width;       // 1x4, 4x4 or 4x1
    int64_t sections, panel;     // how many sections, and the rows of a panel: 16 or 64

    using Members =
        Linear::Members::And<&Int8Tiles::sums, &Int8Tiles::places, &Int8Tiles::first_tiles, &Int8Tiles::height,
                             &Int8Tiles::width, &Int8Tiles::sections, &Int8Tiles::panel>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "rounded_slices.h"

namespace secateur::SECATEUR_ISA {

constexpr int64_t kMostPanel = 64, kOutputs = 16;  // rows of a panel, and those whose outputs are written together

// How a tile finds its inputs: four neighbours, or four columns anywhere, whose lanes lie as they come or are taken by
// `interleave`.
enum class Find { kWord, kColumns, kInterleaved };

// Adds H rows of tiles, `skip` bytes apart, times a slice to sums [H, W * N]. The first tiles set the sums.
template <int W, int N, int H, Find find>
SECATEUR_INLINE void int8_tiles_part(const int8_t* v, int64_t skip, const uint16_t* places, int64_t tiles,
                                     const uint8_t* x, int64_t lanes, bool first, int32_t* sums) {
    // Enough independent sums to hide the latency of a dot product.
    constexpr int kParts = H * N >= 4 ? 1 : 4 / (H * N);
    I<W> a[kParts][H][N] = {};
    if (!first)
        for (int h = 0; h < H; ++h)
            for (int n = 0; n < N; ++n) a[0][h][n] = (I<W>)load_words<W>(sums + h * lanes + n * W);
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
        prefetch(v, 1024);
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
                                    int64_t lanes, bool first, int32_t* sums) {
    constexpr int kSums = kRegisters / 2;  // the other half holds inputs and codes
    constexpr int kN = find != Find::kInterleaved && H * N > kSums ? kSums / H : N,
                  kH = kSums / kN < H ? kSums / kN : H;
    for (int h = 0; h < H; h += kH)
        for (int n = 0; n < N; n += kN)
            int8_tiles_part<W, kN, kH, find>(v + h * 4, H * 4, places, tiles, x + n * W * (find == Find::kWord ? 4 : 1),
                                             lanes, first, sums + h * lanes + n * W);
}

template <int H, Find find, Find wide>
SECATEUR_INLINE void int8_tiles_lanes(const int8_t* v, const uint16_t* places, int64_t tiles, const uint8_t* x,
                                      int64_t lanes, bool first, int32_t* sums) {
    if (lanes == kWidth * 4) return int8_tiles_row<kWidth, 4, H, wide>(v, places, tiles, x, lanes, first, sums);
    if constexpr (kWidth == 16 && find != wide) {
        if (lanes == 32) return int8_tiles_row<8, 4, H, wide>(v, places, tiles, x, lanes, first, sums);
    } else {
        if (lanes == kWidth * 2) return int8_tiles_row<kWidth, 2, H, find>(v, places, tiles, x, lanes, first, sums);
    }
    if (lanes == kWidth) return int8_tiles_row<kWidth, 1, H, find>(v, places, tiles, x, lanes, first, sums);
    if constexpr (kWidth == 16) int8_tiles_row<8, 1, H, find>(v, places, tiles, x, lanes, first, sums);
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
    const auto four = [&](int tile)
                          SECATEUR_INLINED { return U<4>{word(tile), word(tile + 1), word(tile + 2), word(tile + 3)}; };
    if constexpr (kWidth / H == 1) return Words{} + word(0);
    else if constexpr (kWidth / H == 2) return quadruple<kWidth>(U<4>{word(0), word(1)});
    else if constexpr (H == 4) return quadruple<kWidth>(four(0));
    else if constexpr (kWidth == 4) return four(0);
    else if constexpr (kWidth == 8) return join<8>(four(0), four(4));
    else return join<16>(join<8>(four(0), four(4)), join<8>(four(8), four(12)));
}

// Adds a row of tiles times one row of x to sums [kWidth], whose lanes h, h + H, ... belong to row h.
template <int H, bool Columns>
SECATEUR_INLINE void int8_tiles_single(const int8_t* v, const uint16_t* places, int64_t tiles, const uint8_t* x,
                                       Whole& sums) {
    constexpr int kTogether = kWidth / H;  // tiles in a vector
    Whole other = {};
    const auto add = [&](int64_t tile, Whole& to, Words keep) SECATEUR_INLINED {
        to = dot(to, single_inputs<H, Columns>(x, places + tile * (Columns ? 4 : 1)),
                 load_words<kWidth>(v + tile * H * 4) & keep);
    };
    const Words all = ~Words{};
    int64_t tile = 0;
    for (; tile + 2 * kTogether <= tiles; tile += 2 * kTogether) {
        add(tile, sums, all);
        add(tile + kTogether, other, all);
    }
    for (; tile < tiles; tile += kTogether)
        add(tile, sums, first_lanes(int(least(kTogether, tiles - tile)) * H));  // values of other rows follow
    sums += other;
}

// out [H] = the sums of the lanes of each row.
template <int H> SECATEUR_INLINE void sum_lanes(const Whole& sums, int32_t* out) {
    I<4> four = {};
    for (int i = 0; i < kWidth; i += 4) four += (I<4>)load_words<4>(reinterpret_cast<const char*>(&sums) + i * 4);
    if constexpr (H == 4) __builtin_memcpy(out, &four, sizeof four);
    else out[0] = four[0] + four[1] + four[2] + four[3];
}

template <int H, Find find, Find wide> inline void int8_tiles_of(const Int8Tiles& args) {
    constexpr bool kColumns = find == Find::kColumns;
    const int64_t panels = ceil_div(args.rows, args.panel), each = args.panel / H;
    const int8_t* values = static_cast<const int8_t*>(args.values);
    // Calls f(row of the panel, its tiles in a section, whether this is the first section).
    const auto each_row = [&](int64_t panel, auto f) SECATEUR_INLINED {
        for (int64_t section = 0; section < args.sections; ++section) {
            const int64_t* first = args.first_tiles + (panel * args.sections + section) * each;
            for (int64_t i = 0; i < each; ++i)
                f(i, values + first[i] * H * 4, args.places + first[i] * (kColumns ? 4 : 1), first[i + 1] - first[i],
                  section == 0);
        }
    };
    constexpr int64_t kLeastSlice = H == 4 && !kColumns ? 3 : 2;  // rows of x from which on they lie side by side
    if (args.batch < kLeastSlice) {
        const Rounded x = rounded_input(args);
        each_in_parallel(args.threads, panels, 1, [&](int64_t panel, int64_t) {
            for (int64_t b = 0; b < args.batch; ++b) {
                Whole sums[kMostPanel / H] = {};
                each_row(panel,
                         [&](int64_t i, const int8_t* v, const uint16_t* places, int64_t tiles, bool) SECATEUR_INLINED {
                    int8_tiles_single<H, kColumns>(v, places, tiles, x.bytes + b * x.stride, sums[i]);
                });
                int32_t totals[kMostPanel];
                for (int64_t i = 0; i < each; ++i) sum_lanes<H>(sums[i], totals + i * H);
                for (int64_t row = panel * args.panel, i = 0; i < args.panel && row + i < args.rows; i += kWidth)
                    write_rounded(args, args.sums, x, b, row + i, (Whole)load_words<kWidth>(totals + i));
            }
        });
        return;
    }
    const int64_t work = args.panel * kMostLanes;
    int32_t* memory = static_cast<int32_t*>(scratch(kWork, args.threads * work * 4));
    const Order order = kColumns ? Order::kColumns : Order::kWords;
    each_part_and_rounded_slice(args, order, panels, [&](int64_t panel, const Slice& slice, int64_t thread) {
        int32_t* sums = memory + thread * work;
        const int64_t lanes = slice.lanes, row = panel * args.panel, count = least(args.panel, args.rows - row);
        // A store to memory that is not in the cache waits for it.
        for (int64_t lane = 0; lane < least(lanes, args.batch - slice.start); ++lane)
            for (int64_t i = 0; i < count; i += kOutputs)
                __builtin_prefetch(args.y + (slice.start + lane) * args.rows + row + i, 1);
        each_row(panel,
                 [&](int64_t i, const int8_t* v, const uint16_t* places, int64_t tiles, bool first) SECATEUR_INLINED {
            int8_tiles_lanes<H, find, wide>(v, places, tiles, slice.bytes, lanes, first, sums + i * H * lanes);
        });
        for (int64_t i = 0; i < count; i += kOutputs)
            unpack_rounded(args, args.sums, slice, sums + i * lanes, row + i, least(kOutputs, count - i));
    });
}

inline void int8_tiles(const Int8Tiles& args) {
    if (args.height == 1) return int8_tiles_of<1, Find::kWord, Find::kWord>(args);
    if (args.width == 4) return int8_tiles_of<4, Find::kWord, Find::kWord>(args);
    int8_tiles_of<4, Find::kColumns, Find::kInterleaved>(args);
}

}  // namespace secateur::SECATEUR_ISA
#endif
