// Vectors of the instruction set that is compiled for. simd/<isa>.h holds all that differs between them:
//
//   kWidth            floats in a vector: 4, 8 or 16
//   kRegisters        vector registers, which limits how many sums a kernel keeps
//   kExpandWidth      W of an expand<W> that is fast on every machine of this instruction set, 0 for none
//   kWideExpandWidth  W of one that is faster where fast_wide_expand says so, 0 for none
//   expand            for those widths
//   load_values, spread  specialised where the machine is better at it than simd/types.h
//   gather4           four floats at four places, 8 or 16 bits each
//   GroupInputs, load_group<Bits>(x)  the group of inputs that places of 2 or 4 bits choose from; reads 4 or 16 floats
//   dot(sums, a, b)   adds the products of four unsigned bytes of a and four signed bytes of b to each of kWidth sums,
//                     exactly: no product saturates
//   join, quadruple, columns_of, interleave  specialised for vectors of more than four words; see simd/types.h
//   to_bytes(p, v, zero)  writes kWidth floats as bytes: rounded to the nearest whole number, ties to even, plus zero
//   expand_bytes(mask, p)  4 * kWidth bytes: the next byte of p where a bit of the mask is set, else 0. Other bits of
//   the
//                     mask do not count. Reads 4 * kWidth bytes whatever the mask.
//   unpack_nibbles(p) 4 * kWidth signed bytes from the halves of half as many bytes, less 8 each, the lower half first
//   Places            kWidth words of places: read(words), take<Bits>(group), which gives each lane the input at the
//                     lowest place of its word, and next<Bits>(), which goes to the next place
#pragma once
#include "simd/types.h"

#define SECATEUR_TEXT(tokens) #tokens
// clang-format off: spaces around the slash would become part of the file's name.
#define SECATEUR_SIMD_HEADER(isa) SECATEUR_TEXT(simd/isa.h)
// clang-format on
#include SECATEUR_SIMD_HEADER(SECATEUR_ISA)

namespace secateur::SECATEUR_ISA {

using V = F<kWidth>;
using Words = U<kWidth>;
using Whole = I<kWidth>;
using SignedBytes = typename Types<kWidth>::b;

// All comparisons are such that a NaN passes through.
SECATEUR_INLINE V magnitude(V v) { return (V)((Words)v & 0x7fffffffu); }
SECATEUR_INLINE V sign(V v) {
    const V zero = {}, one = broadcast<kWidth>(1);
    return v > zero ? one : (v < zero ? -one : zero);
}
SECATEUR_INLINE V at_least(V v, float low) { return v < broadcast<kWidth>(low) ? broadcast<kWidth>(low) : v; }

// 1 / (1 + exp(-z)), with exp(-z) = 2^n exp(f), n whole and |f| <= ln 2 / 2. Beyond the clamps the result is 0 or 1.
SECATEUR_INLINE V sigmoid(V z) {
    V x = at_least(-z, -88);
    x = x > broadcast<kWidth>(89) ? broadcast<kWidth>(89) : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added to a number, its lowest bits are the nearest integer
    const V rounded = x * 1.44269504f + kRound, n = rounded - kRound;
    const V f = x - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
    V p = f * 1.3814594e-3f + 8.3687194e-3f;  // minimax of (exp(f) - 1 - f) / f^2; 3e-9 of exp(f) at most
    p = p * f + 4.1668389e-2f;
    p = p * f + 0.16666521f;
    p = p * f + 0.49999993f;
    p = p * (f * f) + f + 1.0f;
    return 1.0f / (1.0f + p * (V)(((Words)rounded << 23) + (127u << 23)));
}

// All bits of the first `count` lanes.
SECATEUR_INLINE Words first_lanes(int count) {
    Words lane = {};
    for (int i = 0; i < kWidth; ++i) lane[i] = uint32_t(i);
    return (Words)(lane < Words{} + uint32_t(count));
}

// The first `count` floats or whole numbers, then zeros.
SECATEUR_INLINE V read(const float* p, int64_t count) {
    if (count == kWidth) return load<kWidth>(p);
    V v = {};
    __builtin_memcpy(&v, p, size_t(count) * sizeof(float));
    return v;
}
SECATEUR_INLINE Whole read(const int32_t* p, int64_t count) {
    return (Whole)read(reinterpret_cast<const float*>(p), count);
}
SECATEUR_INLINE void write(float* p, V v, int64_t count) {
    if (count == kWidth) return store<kWidth>(p, v);
    __builtin_memcpy(p, &v, size_t(count) * sizeof(float));
}

}  // namespace secateur::SECATEUR_ISA
