// The whole of what differs between instruction sets. Each isa_*.cpp defines SECATEUR_ISA_NAMESPACE, is compiled with
// its own flags and has its own copy. Nothing here or in kernels.inc may call an inline function of the standard library:
// the linker could keep the copy made for a wider instruction set and run it on a machine that lacks it.
#pragma once
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace secateur {
namespace SECATEUR_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <int W> struct Types;
template <> struct Types<4> {
    typedef float f __attribute__((vector_size(16)));
    typedef uint32_t u __attribute__((vector_size(16)));
};
template <> struct Types<8> {
    typedef float f __attribute__((vector_size(32)));
    typedef uint32_t u __attribute__((vector_size(32)));
};
template <> struct Types<16> {
    typedef float f __attribute__((vector_size(64)));
    typedef uint32_t u __attribute__((vector_size(64)));
};
template <int W> using F = typename Types<W>::f;
template <int W> using U = typename Types<W>::u;

template <int W> inline F<W> load(const float* p) {
    F<W> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <int W> inline void store(float* p, F<W> v) { __builtin_memcpy(p, &v, sizeof v); }
template <int W> inline F<W> broadcast(float s) {
    if constexpr (W == 4) return F<4>{s, s, s, s};
    else if constexpr (W == 8) return F<8>{s, s, s, s, s, s, s, s};
    else return F<16>{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
}
template <int W> inline float sum(F<W> v) {
    float s[W];
    store<W>(s, v);
    for (int w = W / 2; w > 0; w /= 2)
        for (int i = 0; i < w; ++i) s[i] += s[i + w];
    return s[0];
}

inline float decode(float v) { return v; }
inline float decode(int8_t v) { return float(v); }
inline float decode(bf16 v) {
    const uint32_t bits = uint32_t(v.bits) << 16;
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}
inline float decode(f16 v) {
    const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
    uint32_t bits;
    float f;
    if (rest < 0x400) {  // subnormal: a whole number of 2^-24
        f = float(rest) * 5.9604644775390625e-8f;
        __builtin_memcpy(&bits, &f, 4);
    } else {
        bits = (rest << 13) + (rest < 0x7c00 ? (112u << 23) : (224u << 23));
    }
    bits |= sign;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

// W stored values as floats.
template <int W, class T> inline F<W> load_values(const T* p) {
    F<W> v;
    for (int i = 0; i < W; ++i) v[i] = decode(p[i]);
    return v;
}
template <> inline F<4> load_values<4, float>(const float* p) { return load<4>(p); }
template <> inline F<8> load_values<8, float>(const float* p) { return load<8>(p); }
template <> inline F<16> load_values<16, float>(const float* p) { return load<16>(p); }
#if defined(__AVX2__)
inline __m128i load64(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load32(const void* p) {
    int32_t v;
    __builtin_memcpy(&v, p, 4);
    return _mm_cvtsi32_si128(v);
}
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
#endif
#if defined(__AVX512F__)
inline __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
template <> inline F<16> load_values<16, bf16>(const bf16* p) {
    return (F<16>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load256(p)), 16);
}
template <> inline F<16> load_values<16, int8_t>(const int8_t* p) {
    return (F<16>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load128(p)));
}
template <> inline F<16> load_values<16, f16>(const f16* p) { return (F<16>)_mm512_cvtph_ps(load256(p)); }
#endif

// Four floats at four places.
template <class I> inline F<4> gather4(const float* x, const I* places) {
#if defined(__AVX2__)
    uint64_t p = 0;
    __builtin_memcpy(&p, places, 4 * sizeof(I));
    constexpr int kBits = 8 * sizeof(I);
    constexpr uint64_t kMask = (uint64_t(1) << kBits) - 1;
    __m128 v = _mm_load_ss(x + (p & kMask));
    v = _mm_insert_ps(v, _mm_load_ss(x + ((p >> kBits) & kMask)), 0x10);
    v = _mm_insert_ps(v, _mm_load_ss(x + ((p >> (2 * kBits)) & kMask)), 0x20);
    v = _mm_insert_ps(v, _mm_load_ss(x + ((p >> (3 * kBits)) & kMask)), 0x30);
    return (F<4>)v;
#else
    return F<4>{x[places[0]], x[places[1]], x[places[2]], x[places[3]]};
#endif
}

#if defined(__AVX2__)
struct ExpandTable {
    int8_t lane[256][8];  // which value each lane takes; -1: none
    constexpr ExpandTable() : lane() {
        for (int mask = 0; mask < 256; ++mask)
            for (int i = 0, next = 0; i < 8; ++i) lane[mask][i] = int8_t((mask >> i) & 1 ? next++ : -1);
    }
};
alignas(64) constexpr ExpandTable kExpand;

// Lane i gets the next unused value if bit i of mask is set, else 0. Reads W values whatever the mask.
template <int W, class T> inline F<W> expand(uint32_t mask, const T* p) {
#if defined(__AVX512F__)
    if constexpr (W == 16) return (F<16>)_mm512_maskz_expand_ps(__mmask16(mask), (__m512)load_values<16, T>(p));
    else
        return (F<8>)_mm256_maskz_permutexvar_ps(__mmask8(mask), _mm256_cvtepi8_epi32(load64(kExpand.lane[mask])),
                                                 (__m256)load_values<8, T>(p));
#else
    const __m256i lane = _mm256_cvtepi8_epi32(load64(kExpand.lane[mask]));
    const __m256 taken = _mm256_permutevar8x32_ps((__m256)load_values<8, T>(p), lane);
    return (F<8>)_mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lane, 31)), taken);
#endif
}
#endif

// Lane i gets x[i / H]; reads W / H floats.
template <int W, int H> inline F<W> spread(const float* x) {
    if constexpr (H == 1) {
        return load<W>(x);
    } else if constexpr (H == W) {
        return broadcast<W>(x[0]);
    } else if constexpr (W == 4) {
        return F<4>{x[0], x[0], x[1], x[1]};
    } else if constexpr (W == 8 && H == 2) {
        return F<8>{x[0], x[0], x[1], x[1], x[2], x[2], x[3], x[3]};
    } else if constexpr (W == 8 && H == 4) {
        return F<8>{x[0], x[0], x[0], x[0], x[1], x[1], x[1], x[1]};
    } else {
#if defined(__AVX512F__)
        __m512 v;
        __m512i lane;
        if constexpr (H == 8) {
            double pair;
            __builtin_memcpy(&pair, x, sizeof pair);
            v = _mm512_castpd_ps(_mm512_set1_pd(pair));
            lane = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        } else if constexpr (H == 4) {
            v = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
            lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        } else {
            v = _mm512_castps256_ps512(_mm256_loadu_ps(x));
            lane = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        }
        return (F<16>)_mm512_permutexvar_ps(lane, v);
#endif
    }
}

// Lane i gets lane i ^ D.
template <int W, int D> inline F<W> exchange(F<W> v) {
#if defined(__clang__)
    F<W> other = v;
    for (int i = 0; i < W; ++i) other[i] = v[i ^ D];
    return other;
#else
    U<W> lane = {};
    for (int i = 0; i < W; ++i) lane[i] = uint32_t(i ^ D);
    return __builtin_shuffle(v, lane);
#endif
}

}  // namespace SECATEUR_ISA_NAMESPACE
}  // namespace secateur
