// Vectors as the compiler has them for every instruction set, and the functions that simd/<isa>.h may specialise.
#pragma once
#include <stddef.h>

#include <cstdint>

#define SECATEUR_INLINE inline __attribute__((always_inline))
#define SECATEUR_INLINED __attribute__((always_inline))  // for lambdas

namespace secateur::SECATEUR_ISA {

// The types of stored values.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class Value> struct Tag { using type = Value; };

// Calls f with a tag of the type that has this number in secateur/formats/_values.py.
template <class Function> SECATEUR_INLINE void with_type(int value_type, Function f) {
    switch (value_type) {
        case 0: return f(Tag<float>());
        case 1: return f(Tag<bf16>());
        case 2: return f(Tag<int8_t>());
        default: return f(Tag<f16>());
    }
}

template <int W> struct Types;
template <> struct Types<4> {
    typedef float f __attribute__((vector_size(16)));
    typedef uint32_t u __attribute__((vector_size(16)));
    typedef int32_t i __attribute__((vector_size(16)));
};
template <> struct Types<8> {
    typedef float f __attribute__((vector_size(32)));
    typedef uint32_t u __attribute__((vector_size(32)));
    typedef int32_t i __attribute__((vector_size(32)));
};
template <> struct Types<16> {
    typedef float f __attribute__((vector_size(64)));
    typedef uint32_t u __attribute__((vector_size(64)));
    typedef int32_t i __attribute__((vector_size(64)));
};
template <int W> using F = typename Types<W>::f;
template <int W> using U = typename Types<W>::u;
template <int W> using I = typename Types<W>::i;

template <int W> inline F<W> load(const float* p) {
    F<W> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <int W> inline U<W> load_words(const void* p) {
    U<W> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <int W> inline void store(float* p, F<W> v) { __builtin_memcpy(p, &v, sizeof v); }
template <int W> inline F<W> broadcast(float s) {
    if constexpr (W == 4) return F<4>{s, s, s, s};
    else if constexpr (W == 8) return F<8>{s, s, s, s, s, s, s, s};
    else return F<16>{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
}
template <int W> SECATEUR_INLINE float sum(F<W> v) {
    float s[W];
    store<W>(s, v);
    for (int w = W / 2; w > 0; w /= 2)
        for (int i = 0; i < w; ++i) s[i] += s[i + w];
    return s[0];
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

template <class T> inline void prefetch(const T* p, int64_t bytes) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + bytes);
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

// Lane i gets x[i / H]; reads W / H floats.
template <int W, int H> inline F<W> spread(const float* x) {
    if constexpr (H == 1) return load<W>(x);
    else if constexpr (H == W) return broadcast<W>(x[0]);
    else if constexpr (W == 4) return F<4>{x[0], x[0], x[1], x[1]};
    else if constexpr (W == 8 && H == 2) return F<8>{x[0], x[0], x[1], x[1], x[2], x[2], x[3], x[3]};
    else if constexpr (W == 8 && H == 4) return F<8>{x[0], x[0], x[0], x[0], x[1], x[1], x[1], x[1]};
    else {
        F<W> v;
        for (int i = 0; i < W; ++i) v[i] = x[i / H];
        return v;
    }
}

// Lane i gets the next unused value if bit i of the mask is set, else 0. Reads W values whatever the mask. Defined only
// where kExpandWidth or kWideExpandWidth is W.
template <int W, class T> F<W> expand(uint32_t mask, const T* p);

}  // namespace secateur::SECATEUR_ISA
