// compile: -mavx2 -mfma -mf16c -mbmi -mbmi2 -mlzcnt -mpopcnt -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd
// AVX-512: Intel servers since Skylake (2017), AMD since Zen 4 (2022).
#pragma once
#include "simd/x86.h"

namespace secateur::SECATEUR_ISA {

constexpr int kWidth = 16;
constexpr int kRegisters = 32;
constexpr int kExpandWidth = 8;
constexpr int kWideExpandWidth = 16;

inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

template <> inline F<16> load_values<16, bf16>(const bf16* p) {
    return (F<16>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16);
}
template <> inline F<16> load_values<16, int8_t>(const int8_t* p) {
    return (F<16>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p)));
}
template <> inline F<16> load_values<16, f16>(const f16* p) { return (F<16>)_mm512_cvtph_ps(load256(p)); }

template <int W, class T> inline F<W> expand(uint32_t mask, const T* p) {
    if constexpr (W == 16) return (F<16>)_mm512_maskz_expand_ps(__mmask16(mask), (__m512)load_values<16, T>(p));
    else
        return (F<8>)_mm256_maskz_permutexvar_ps(__mmask8(mask), _mm256_cvtepi8_epi32(load64(kExpand.lane[mask])),
                                                 (__m256)load_values<8, T>(p));
}

template <> inline F<16> spread<16, 2>(const float* x) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    return (F<16>)_mm512_permutexvar_ps(lane, _mm512_castps256_ps512(_mm256_loadu_ps(x)));
}
template <> inline F<16> spread<16, 4>(const float* x) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (F<16>)_mm512_permutexvar_ps(lane, _mm512_broadcast_f32x4(_mm_loadu_ps(x)));
}
template <> inline F<16> spread<16, 8>(const float* x) {
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    double pair;
    __builtin_memcpy(&pair, x, sizeof pair);
    return (F<16>)_mm512_permutexvar_ps(lane, _mm512_castpd_ps(_mm512_set1_pd(pair)));
}

using GroupInputs = __m512;
template <int Bits> SECATEUR_INLINE GroupInputs load_group(const float* x) {
    if constexpr (Bits == 2) return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
    else return _mm512_loadu_ps(x);
}

struct Places {
    __m512i words;
    SECATEUR_INLINE void read(const uint32_t* p) { words = _mm512_loadu_si512(p); }
    template <int Bits> SECATEUR_INLINE F<16> take(GroupInputs x) const {
        const __m512 v = Bits == 2 ? _mm512_permutevar_ps(x, words) : _mm512_permutexvar_ps(words, x);
        return (F<16>)v;
    }
    template <int Bits> SECATEUR_INLINE void next() { words = _mm512_srli_epi32(words, Bits); }
};

SECATEUR_INLINE I<16> dot(I<16> sums, U<16> a, U<16> b) {
#if defined(__AVX512VNNI__)
    return (I<16>)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    // Even and odd bytes, in words of 16 bits: the instruction that multiplies bytes saturates.
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512((__m512i)a, _mm512_set1_epi16(0xff)),
                                           _mm512_srai_epi16(_mm512_slli_epi16((__m512i)b, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)a, 8), _mm512_srai_epi16((__m512i)b, 8));
    return sums + (I<16>)even + (I<16>)odd;
#endif
}

SECATEUR_INLINE void to_bytes(uint8_t* p, F<16> v, int32_t zero) {
    const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32((__m512)v), _mm512_set1_epi32(zero));
    const __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

}  // namespace secateur::SECATEUR_ISA
