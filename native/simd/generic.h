// compile:
// Every processor. The compiler makes vectors of four floats from the machine's own, SSE2 on 64-bit x86.
#pragma once
#include "simd/types.h"

namespace secateur::SECATEUR_ISA {

constexpr int kWidth = 4;
constexpr int kRegisters = 16;
constexpr int kExpandWidth = 0;
constexpr int kWideExpandWidth = 0;

template <class I> inline F<4> gather4(const float* x, const I* places) {
    return F<4>{x[places[0]], x[places[1]], x[places[2]], x[places[3]]};
}

using GroupInputs = const float*;
template <int Bits> inline GroupInputs load_group(const float* x) { return x; }

struct Places {
    uint32_t words[4];
    void read(const uint32_t* p) { __builtin_memcpy(words, p, sizeof words); }
    template <int Bits> F<4> take(GroupInputs x) const {
        constexpr uint32_t kMask = (1u << Bits) - 1;
        return F<4>{x[words[0] & kMask], x[words[1] & kMask], x[words[2] & kMask], x[words[3] & kMask]};
    }
    template <int Bits> void next() {
        for (uint32_t& w : words) w >>= Bits;
    }
};

SECATEUR_INLINE I<4> dot(I<4> sums, U<4> a, U<4> b) {
    for (int byte = 0; byte < 4; ++byte)
        sums += (I<4>)((a >> (8 * byte)) & 0xff) * ((I<4>)(b << (24 - 8 * byte)) >> 24);
    return sums;
}

inline void to_bytes(uint8_t* p, F<4> v, int32_t zero) {
    for (int i = 0; i < 4; ++i) {
        const int32_t whole = int32_t(__builtin_lrintf(v[i])) + zero;
        p[i] = uint8_t(whole < 0 ? 0 : whole > 255 ? 255 : whole);
    }
}

}  // namespace secateur::SECATEUR_ISA
