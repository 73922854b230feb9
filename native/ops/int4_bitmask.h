// Rows of packed numbers from -7 to 7, two in a byte, one bit for each column that says where they stand, and a scale
// for each row and group of 64 columns. Each group starts at a whole byte. The inputs are rounded to bytes.
#pragma once
#include "linear.h"

namespace secateur {

struct Int4Bitmask : Linear {
    const uint64_t* mask;    // [rows, groups], lowest bit first
    const int64_t* offsets;  // [rows + 1], the first byte of each row
    const uint16_t* scales;  // float16 [rows, groups]
    const float* sums;       // [rows] the sum of the weights of each row

    using Members =
        Linear::Members::And<&Int4Bitmask::mask, &Int4Bitmask::offsets, &Int4Bitmask::scales, &Int4Bitmask::sums>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "ops/int4_panels.h"
#include "ops/int8_bitmask.h"

namespace secateur::SECATEUR_ISA {

// The numbers of one group as bytes, in the order in which they are stored, with readable bytes after them.
struct Unpacked {
    int8_t bytes[64 + kBytes];
    SECATEUR_INLINE void read(const uint8_t* p) {
#pragma GCC unroll 4
        for (int part = 0; part < kVectorsOfWord; ++part) {
            const Words words = unpack_nibbles(p + part * kBytes / 2);
            __builtin_memcpy(bytes + part * kBytes, &words, sizeof words);
        }
    }
};

SECATEUR_INLINE int64_t bytes_of_group(uint64_t bits) { return (__builtin_popcountll(bits) + 1) / 2; }

// The scales of `count` groups as floats.
SECATEUR_INLINE void read_scales(const f16* from, int64_t count, float* to) {
    if (count < kWidth) {
        for (int64_t i = 0; i < count; ++i) to[i] = decode(from[i]);
        return;
    }
    for (int64_t i = 0; i < count; i += kWidth) {
        const int64_t at = least(i, count - kWidth);
        store<kWidth>(to + at, load_values<kWidth, f16>(from + at));
    }
}

// One row of the weight times B rows of x.
template <int B>
SECATEUR_INLINE void int4_bitmask_row(const uint64_t* mask, const f16* scales, int64_t groups, const uint8_t* p,
                                      const uint8_t* x, int64_t stride, V* out) {
    constexpr int kSums = B <= 2 ? 4 / B : 1;  // independent sums hide the latency of an FMA
    constexpr int64_t kScales = 128;
    float scale[kScales];
    V sums[B][kSums] = {};
    const auto word = [&](int64_t w, int s) SECATEUR_INLINED {
        const uint64_t bits = mask[w];
        prefetch(p, 4096);
        Unpacked unpacked;
        unpacked.read(p);
        p += bytes_of_group(bits);
        const int8_t* next = unpacked.bytes;
        Whole whole[B] = {};
#pragma GCC unroll 4
        for (int part = 0; part < kVectorsOfWord; ++part) {
            const uint64_t some = part_of_word(bits, part);
            const Words v = expand_bytes(some, next);
            if (part + 1 < kVectorsOfWord) next += __builtin_popcountll(some);
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
                whole[b] = dot(whole[b], load_words<kWidth>(x + b * stride + w * 64 + part * kBytes), v);
        }
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b)
            sums[b][s] += __builtin_convertvector(whole[b], V) * broadcast<kWidth>(scale[w % kScales]);
    };
    for (int64_t w = 0; w < groups;) {
        const int64_t last = least(w + kScales, groups);
        read_scales(scales + w, last - w, scale);
        for (; w + kSums <= last; w += kSums)
#pragma GCC unroll 4
            for (int s = 0; s < kSums; ++s) word(w + s, s);
        for (; w < last; ++w) word(w, 0);
    }
    for (int b = 0; b < B; ++b) {
        for (int s = 1; s < kSums; ++s) sums[b][0] += sums[b][s];
        out[b] = sums[b][0];
    }
}

// The rows of a vector, from `first` on, times B rows of x.
template <int B>
__attribute__((noinline)) void int4_bitmask_rows(const Int4Bitmask& args, const Rounded& x, int64_t b, int64_t first) {
    const int64_t groups = ceil_div(args.columns, 64), count = least(kWidth, args.rows - first);
    const f16* scales = reinterpret_cast<const f16*>(args.scales);
    V found[B][kWidth] = {};
    for (int64_t r = first; r < first + count; ++r) {
        const uint8_t* p = static_cast<const uint8_t*>(args.values) + args.offsets[r];
        V out[B];
        int4_bitmask_row<B>(args.mask + r * groups, scales + r * groups, groups, p, x.bytes + b * x.stride, x.stride,
                            out);
        for (int i = 0; i < B; ++i) found[i][r - first] = out[i];
    }
    for (int i = 0; i < B; ++i) write_rounded(args, args.sums, x, b + i, first, sums_of_rows(found[i]));
}

// The 16 rows from `first` on, expanded to a panel of bytes, and their scales.
__attribute__((noinline)) inline void int4_bitmask_panel(const Int4Bitmask& args, int64_t first, uint8_t* panel,
                                                         f16* scales) {
    const int64_t groups = ceil_div(args.columns, 64);
    for (int64_t row = first; row < first + kInt4Rows; row += kWidth) {
        const uint8_t* p[kWidth];
        const int64_t count = least(kWidth, args.rows - row);
        for (int64_t r = 0; r < count; ++r) p[r] = static_cast<const uint8_t*>(args.values) + args.offsets[row + r];
        for (int64_t w = 0; w < groups; ++w) {
            Unpacked unpacked[kWidth];
            const int8_t* next[kWidth];
            for (int64_t r = 0; r < kWidth; ++r)
                scales[w * kInt4Rows + row - first + r].bits = r < count ? args.scales[(row + r) * groups + w] : 0;
            for (int64_t r = 0; r < count; ++r) {
                unpacked[r].read(p[r]);
                next[r] = unpacked[r].bytes;
                p[r] += bytes_of_group(args.mask[(row + r) * groups + w]);
            }
            for (int part = 0; part < kVectorsOfWord; ++part) {
                Words tile[kWidth] = {};
                for (int64_t r = 0; r < count; ++r) {
                    const uint64_t some = part_of_word(args.mask[(row + r) * groups + w], part);
                    tile[r] = expand_bytes(some, next[r]);
                    if (part + 1 < kVectorsOfWord) next[r] += __builtin_popcountll(some);
                }
                transpose_words(tile);
                uint8_t* to = panel + ((w * 16 + part * kWidth) * kInt4Rows + (row - first)) * 4;
                for (int k = 0; k < kWidth; ++k, to += kInt4Rows * 4) __builtin_memcpy(to, &tile[k], sizeof tile[k]);
            }
        }
    }
}

inline void int4_bitmask(const Int4Bitmask& args) {
    const Rounded x = rounded_input(args);
    if (args.batch <= kFewRows)
        return few_rows(args, [&](auto rows, int64_t b, int64_t row)
                                  SECATEUR_INLINED { int4_bitmask_rows<decltype(rows)::value>(args, x, b, row); });
    // Expanded once, a few rows are multiplied as panels of all weights are.
    const int64_t groups = ceil_div(args.columns, 64), vectors = ceil_div(args.rows, kInt4Rows) * kInt4Vectors;
    const int64_t panel = groups * 64 * kInt4Rows, scales = groups * kInt4Rows * 2;
    const int64_t together = ceil_div(kInt4Together, kInt4Vectors), size = together * (panel + scales);
    uint8_t* work = static_cast<uint8_t*>(scratch(kWork, args.threads * size));
    each_in_parallel(args.threads, ceil_div(vectors, kInt4Vectors * together), 1, [&](int64_t part, int64_t thread) {
        uint8_t* mine = work + thread * size;
        f16* my_scales = reinterpret_cast<f16*>(mine + together * panel);
        const int64_t first = part * together * kInt4Vectors, last = least(first + together * kInt4Vectors, vectors);
        for (int64_t v = first; v < last; v += kInt4Vectors) {
            const int64_t i = (v - first) / kInt4Vectors;
            int4_bitmask_panel(args, v * kWidth, mine + i * panel, my_scales + i * groups * kInt4Rows);
        }
        for (int64_t v = first; v < last; v += kInt4Together)
            int4_panels_some<false>(args, {mine, my_scales, groups, first, args.sums}, x, v, last);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
