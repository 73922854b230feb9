// What AVX2 and AVX-512 share: vectors of four and eight floats, and of 32 bytes.
#pragma once
#include <immintrin.h>

#include "simd/types.h"

namespace secateur::SECATEUR_ISA {

inline __m128i load32(const void* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm_cvtsi32_si128(v);
}
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

template <> inline F<4> load_values<4, bf16>(const bf16* p) {
    return (F<4>)_mm_slli_epi32(_mm_cvtepu16_epi32(load64(p)), 16);
}
template <> inline F<4> load_values<4, int8_t>(const int8_t* p) {
    return (F<4>)_mm_cvtepi32_ps(_mm_cvtepi8_epi32(load32(p)));
}
template <> inline F<4> load_values<4, f16>(const f16* p) { return (F<4>)_mm_cvtph_ps(load64(p)); }
template <> inline F<8> load_values<8, bf16>(const bf16* p) {
    return (F<8>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(p)), 16);
}
template <> inline F<8> load_values<8, int8_t>(const int8_t* p) {
    return (F<8>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load64(p)));
}
template <> inline F<8> load_values<8, f16>(const f16* p) { return (F<8>)_mm256_cvtph_ps(load128(p)); }

// Four floats at four places. Loads into the lanes of a vector are faster than the gather instruction.
template <class I> inline F<4> gather4(const float* x, const I* places) {
    uint64_t p = 0;
    __builtin_memcpy(&p, places, 4 * sizeof(I));
    constexpr int kBits = 8 * sizeof(I);
    constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;
    __m128 v = _mm_load_ss(x + (p & kMask));
    v = _mm_insert_ps(v, _mm_load_ss(x + ((p >> kBits) & kMask)), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + ((p >> (2 * kBits)) & kMask)), 0x20);
    v = _mm_insert_ps(v, _mm_load_ss(x + ((p >> (3 * kBits)) & kMask)), 0x30);
    return (F<4>)v;
}

// For each mask of eight bits: which value each lane takes, -1 for none.
struct ExpandTable {
    int8_t lane[256][8];
    constexpr ExpandTable() : lane() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, next = 0; i < 8; ++i) lane[mask][i] = int8_t((mask >> i) & 1 ? next++ : -1);
    }
};
alignas(64) constexpr ExpandTable kExpand;

// Byte i gets the next byte of p if bit i of the mask is set, else 0. Reads 8 bytes from the first of each half on.
inline __m128i expand16(uint32_t mask, const int8_t* p) {
    const __m128i bytes = _mm_unpacklo_epi64(load64(p), load64(p + __builtin_popcount(mask & 0xff)));
    const __m128i lane = _mm_unpacklo_epi64(load64(kExpand.lane[mask & 0xff]), load64(kExpand.lane[mask >> 8]));
    return _mm_shuffle_epi8(bytes, _mm_or_si128(lane, _mm_set_epi64x(0x0808080808080808, 0)));
}

SECATEUR_INLINE I<8> dot(I<8> sums, U<8> a, U<8> b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return (I<8>)_mm256_dpbusd_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#elif defined(__AVXVNNI__)
    return (I<8>)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    // Even and odd bytes, in words of 16 bits: the instruction that multiplies bytes saturates.
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)a, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)a, 8), _mm256_srai_epi16((__m256i)b, 8));
    return sums + (I<8>)even + (I<8>)odd;
#endif
}

template <> SECATEUR_INLINE U<8> join<8>(U<4> a, U<4> b) { return (U<8>)_mm256_set_m128i((__m128i)b, (__m128i)a); }
template <> SECATEUR_INLINE U<8> quadruple<8>(U<4> v) {
    const __m256i lane = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return (U<8>)_mm256_permutevar8x32_epi32(_mm256_castsi128_si256((__m128i)v), lane);
}

template <> SECATEUR_INLINE U<8> columns_of<8>(const uint8_t* const (&c)[4]) {
    const __m128i low = _mm_unpacklo_epi64(load64(c[0]), load64(c[1])),
                  high = _mm_unpacklo_epi64(load64(c[2]), load64(c[3]));
    const __m256i words =
        _mm256_permutevar8x32_epi32(_mm256_set_m128i(high, low), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (U<8>)_mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(order));
}

template <> SECATEUR_INLINE void interleave<8>(const uint8_t* const (&c)[4], U<8> (&to)[4]) {
    const auto column = [&](int i)
                            SECATEUR_INLINED { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c[i])); };
    const __m256i a = _mm256_unpacklo_epi8(column(0), column(1)), b = _mm256_unpacklo_epi8(column(2), column(3));
    const __m256i d = _mm256_unpackhi_epi8(column(0), column(1)), e = _mm256_unpackhi_epi8(column(2), column(3));
    to[0] = (U<8>)_mm256_unpacklo_epi16(a, b);
    to[1] = (U<8>)_mm256_unpackhi_epi16(a, b);
    to[2] = (U<8>)_mm256_unpacklo_epi16(d, e);
    to[3] = (U<8>)_mm256_unpackhi_epi16(d, e);
}

}  // namespace secateur::SECATEUR_ISA
