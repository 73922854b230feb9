// compile: -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt
// AVX2 with FMA: Intel since Haswell (2013), AMD since Zen (2017).
#pragma once
#include "simd/x86.h"

namespace secateur::SECATEUR_ISA {

constexpr int kWidth = 8;
constexpr int kRegisters = 16;
constexpr int kExpandWidth = 8;
constexpr int kWideExpandWidth = 0;

template <int W, class T> inline F<W> expand(uint32_t mask, const T* p) {
    const __m256i lane = _mm256_cvtepi8_epi32(load64(kExpand.lane[mask]));
    const __m256 taken = _mm256_permutevar8x32_ps((__m256)load_values<8, T>(p), lane);
    return (F<8>)_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), taken);
}

struct GroupInputs { __m256 low, high; };
template <int Bits> SECATEUR_INLINE GroupInputs load_group(const float* x) {
    if constexpr (Bits == 2) return {_mm256_broadcast_ps((const __m128*)x), _mm256_setzero_ps()};
    else return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}

struct Places {
    __m256i words;
    SECATEUR_INLINE void read(const uint32_t* p) { words = _mm256_loadu_si256((const __m256i*)p); }
    template <int Bits> SECATEUR_INLINE F<8> take(const GroupInputs& x) const {
        if constexpr (Bits == 2) return (F<8>)_mm256_permutevar_ps(x.low, words);
        const __m256 low = _mm256_permutevar8x32_ps(x.low, words), high = _mm256_permutevar8x32_ps(x.high, words);
        // The highest of the four bits of a place chooses the half. The blend looks at a lane's sign bit.
        return (F<8>)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28)));
    }
    template <int Bits> SECATEUR_INLINE void next() { words = _mm256_srli_epi32(words, Bits); }
};

SECATEUR_INLINE I<8> dot(I<8> sums, U<8> a, U<8> b) {
#if defined(__AVXVNNI__)
    return (I<8>)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)a, (__m256i)b);
#else
    // Even and odd bytes, in words of 16 bits: the instruction that multiplies bytes saturates.
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)a, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16((__m256i)b, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)a, 8), _mm256_srai_epi16((__m256i)b, 8));
    return sums + (I<8>)even + (I<8>)odd;
#endif
}

SECATEUR_INLINE void to_bytes(uint8_t* p, F<8> v, int32_t zero) {
    const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32((__m256)v), _mm256_set1_epi32(zero));
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(half, half));
}

}  // namespace secateur::SECATEUR_ISA
