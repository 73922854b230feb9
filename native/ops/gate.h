// The differentiable mask for weights that are kept or pruned one by one: one pass over the weights forward and one or
// two backward. nn/_gate.py has the formulas. Sums are made over parts of a fixed size and added in their order, so
// that they do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "fields.h"

namespace secateur {

// Weights [competitions, units], row-major.
struct Gate {
    const float* weight;
    const float* threshold;  // [competitions], or [competitions, units] if there is one for each weight
    float temperature;
    int64_t competitions, units;
    bool each;    // a threshold for each weight
    bool solved;  // thresholds that follow from a budget; otherwise they are learned
    bool hard;    // a mask of zeros and ones forward
    int threads;

    using Members = Fields<&Gate::weight, &Gate::threshold, &Gate::temperature, &Gate::competitions, &Gate::units,
                           &Gate::each, &Gate::solved, &Gate::hard, &Gate::threads>;
};

struct GateForward : Gate {
    float* out;  // weights times their mask

    using Members = Gate::Members::And<&GateForward::out>;
};

struct GateBackward : Gate {
    const float* grad;    // of the weights times their mask
    float* out;           // gradient of the weights; may be grad
    float* by_threshold;  // gradient of the thresholds, written if they are learned

    using Members = Gate::Members::And<&GateBackward::grad, &GateBackward::out, &GateBackward::by_threshold>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "parts.h"
#include "scratch.h"
#include "simd/vector.h"

namespace secateur::SECATEUR_ISA {

constexpr int64_t kGatePart = 1 << 14;  // weights that a thread takes at a time
constexpr int64_t kGateSum = 1 << 10;   // weights summed in float; their sums are added in double
constexpr float kTiny = 1e-30f;         // keeps 1 / threshold and 1 / sum finite, as in nn/_gate.py
constexpr float kLargest = 3.402823466e38f;

// Zeros in the lanes from `count` on.
SECATEUR_INLINE V only(V v, int64_t count) {
    if (count == kWidth) return v;
    V kept = {};
    __builtin_memcpy(&kept, &v, size_t(count) * sizeof(float));
    return kept;
}

// The threshold of each lane where every `Group` weights share one.
template <int Group> SECATEUR_INLINE V read_thresholds(const float* p, int64_t count) {
    if (count == kWidth) return spread<kWidth, Group>(p);
    float padded[kWidth] = {};
    __builtin_memcpy(padded, p, size_t(count / Group) * sizeof(float));
    return spread<kWidth, Group>(padded);
}
// The sum of its group, in each lane.
template <int Group> SECATEUR_INLINE V group_sum(V v) {
    if constexpr (Group > 1) v += exchange<kWidth, 1>(v);
    if constexpr (Group > 2) v += exchange<kWidth, 2>(v);
    if constexpr (Group > 4) v += exchange<kWidth, 4>(v);
    if constexpr (Group > 8) v += exchange<kWidth, 8>(v);
    return v;
}

// The mask of a vector of weights at its thresholds, in the notation of nn/_gate.py.
template <bool Solved> struct Mask {
    V threshold, slope, offset;
    bool hard;

    SECATEUR_INLINE Mask(const Gate& g, V t)
        : threshold(t), slope(broadcast<kWidth>(g.temperature)), offset(slope), hard(g.hard) {
        if constexpr (Solved) {
            // An infinite threshold means that the budget keeps or prunes everything, in all competitions. The slope is
            // zero there, and the offset decides.
            const V largest = broadcast<kWidth>(kLargest);
            slope = magnitude(t) > largest ? V{} : slope / at_least(t, kTiny);
            if (g.threshold[0] > kLargest || g.threshold[0] < -kLargest) offset = broadcast<kWidth>(g.threshold[0]);
        }
    }
    SECATEUR_INLINE V soft(V w) const {
        return sigmoid(Solved ? magnitude(w) * slope - offset : (magnitude(w) - threshold) * slope);
    }
    SECATEUR_INLINE V kept(V w) const { return magnitude(w) >= threshold ? broadcast<kWidth>(1) : V{}; }
    SECATEUR_INLINE V times(V w) const { return w * (hard ? kept(w) : soft(w)); }
};

// Gradients of a vector of weights. k = m (1 - m), the slope of the sigmoid, is 0 where the mask m is 0 or 1.
template <bool Solved> struct MaskGradient {
    Mask<Solved> mask;
    V w, grad, m, k;

    SECATEUR_INLINE MaskGradient(const Mask<Solved>& mask, V w, V grad)
        : mask(mask), w(w), grad(grad), m(mask.soft(w)), k(m - m * m) {}
    SECATEUR_INLINE V product() const { return grad * w * k; }
    SECATEUR_INLINE V by_score(V shift) const { return (Solved ? (grad * w - shift) * k : grad * k * w) * mask.slope; }
    SECATEUR_INLINE V by_weight(V by_score) const { return grad * (mask.hard ? mask.kept(w) : m) + by_score * sign(w); }
};

// Competitions of 1, 2, 4, 8 or 16 neighbours: whole ones in each vector.
template <bool Solved, int Group> void gate_groups(const Gate& g, float* out) {
    const int64_t total = g.competitions * g.units;
    each_in_parallel(g.threads, ceil_div(total, kGatePart), kEqually, [&](int64_t part, int64_t) {
        const int64_t first = part * kGatePart;
        each_vector(least(kGatePart, total - first), [&](int64_t i, int64_t count) SECATEUR_INLINED {
            i += first;
            const Mask<Solved> mask(g, read_thresholds<Group>(g.threshold + i / Group, count));
            write(out + i, mask.times(read(g.weight + i, count)), count);
        });
    });
}

template <bool Solved, int Group>
void gate_groups_backward(const Gate& g, const float* grad, float* out, float* by_threshold) {
    const int64_t total = g.competitions * g.units;
    each_in_parallel(g.threads, ceil_div(total, kGatePart), kEqually, [&](int64_t part, int64_t) {
        const int64_t first = part * kGatePart;
        each_vector(least(kGatePart, total - first), [&](int64_t i, int64_t count) SECATEUR_INLINED {
            i += first;
            const Mask<Solved> mask(g, read_thresholds<Group>(g.threshold + i / Group, count));
            const MaskGradient<Solved> gradient(mask, read(g.weight + i, count), read(grad + i, count));
            V shift = {};
            if constexpr (Solved)
                shift = group_sum<Group>(gradient.product()) / at_least(group_sum<Group>(gradient.k), kTiny);
            const V by_score = gradient.by_score(shift);
            if constexpr (!Solved) write(by_threshold + i, -by_score, count);
            write(out + i, gradient.by_weight(by_score), count);
        });
    });
}

// Short competitions of other sizes: kWidth of them at a time, one in each lane.
constexpr int64_t kGateShort = 31;

struct Transposed {
    float at[kGateShort][kWidth];

    Transposed(const float* p, int64_t count, int64_t units) {
        for (int64_t j = 0; j < units; ++j) {
            if (count < kWidth) store<kWidth>(at[j], V{});
            for (int64_t i = 0; i < count; ++i) at[j][i] = p[i * units + j];
        }
    }
    void write(float* p, int64_t count, int64_t units) const {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t j = 0; j < units; ++j) p[i * units + j] = at[j][i];
    }
    V operator[](int64_t j) const { return load<kWidth>(at[j]); }
    void set(int64_t j, V v) { store<kWidth>(at[j], v); }
};

inline void gate_short(const Gate& g, float* out) {
    each_in_parallel(g.threads, ceil_div(g.competitions, kWidth), kEqually, [&](int64_t part, int64_t) {
        const int64_t first = part * kWidth;
        const int64_t count = least(kWidth, g.competitions - first), start = first * g.units;
        Transposed w(g.weight + start, count, g.units);
        const Mask<true> mask(g, read(g.threshold + first, count));
        for (int64_t j = 0; j < g.units; ++j) w.set(j, mask.times(w[j]));
        w.write(out + start, count, g.units);
    });
}

inline void gate_short_backward(const Gate& g, const float* grad, float* out) {
    each_in_parallel(g.threads, ceil_div(g.competitions, kWidth), kEqually, [&](int64_t part, int64_t) {
        const int64_t first = part * kWidth;
        const int64_t count = least(kWidth, g.competitions - first), start = first * g.units;
        const Transposed w(g.weight + start, count, g.units);
        Transposed by(grad + start, count, g.units);
        const Mask<true> mask(g, read(g.threshold + first, count));
        V products = {}, slopes = {};
        for (int64_t j = 0; j < g.units; ++j) {
            const MaskGradient<true> gradient(mask, w[j], by[j]);
            products += gradient.product(), slopes += gradient.k;
        }
        const V shift = products / at_least(slopes, kTiny);
        for (int64_t j = 0; j < g.units; ++j) {
            const MaskGradient<true> gradient(mask, w[j], by[j]);
            by.set(j, gradient.by_weight(gradient.by_score(shift)));
        }
        by.write(out + start, count, g.units);
    });
}

// Competitions of any length, such as rows of the matrix or all of it: one part of one at a time.
struct GatePart {
    int64_t row, first, count;  // first: of the part's weights, counted in the whole matrix
};
struct GateParts {
    int64_t units, each, total;
    GateParts(const Gate& g) : units(g.units), each(ceil_div(g.units, kGatePart)), total(each * g.competitions) {}
    GatePart operator[](int64_t i) const {
        const int64_t row = i / each, begin = i % each * kGatePart;
        return {row, row * units + begin, least(kGatePart, units - begin)};
    }
};

template <bool Solved> void gate_rows(const Gate& g, float* out) {
    const GateParts parts(g);
    each_in_parallel(g.threads, parts.total, kEqually, [&](int64_t p, int64_t) {
        const GatePart part = parts[p];
        const Mask<Solved> mask(g, broadcast<kWidth>(g.threshold[part.row]));
        each_vector(part.count, [&](int64_t i, int64_t count) SECATEUR_INLINED {
            i += part.first;
            write(out + i, mask.times(read(g.weight + i, count)), count);
        });
    });
}

struct Sums {
    double products, slopes;
    void operator+=(const Sums& other) { products += other.products, slopes += other.slopes; }
};

template <bool Solved, class Function>
SECATEUR_INLINE void each_gradient(const Gate& g, const float* grad, const GatePart& part, Function f) {
    const Mask<Solved> mask(g, broadcast<kWidth>(g.threshold[part.row]));
    each_vector(part.count, [&](int64_t i, int64_t count) SECATEUR_INLINED {
        i += part.first;
        f(MaskGradient<Solved>(mask, read(g.weight + i, count), read(grad + i, count)), i, count);
    });
}

// Sums over a part. For solved thresholds: of k g w and of k. For learned ones: of the scores' gradients, whose
// negative is the threshold's gradient.
struct RunningSums {
    V products = {}, slopes = {};
    int64_t vectors = 0;
    Sums sums = {0, 0};

    SECATEUR_INLINE void add(V product, V slope) {
        products += product, slopes += slope;
        if (++vectors % (kGateSum / kWidth) == 0) flush();
    }
    SECATEUR_INLINE void flush() {
        sums += {double(sum<kWidth>(products)), double(sum<kWidth>(slopes))};
        products = slopes = V{};
    }
};

inline Sums finish_learned(const Gate& g, const float* grad, float* out, const GatePart& part) {
    RunningSums summed;
    each_gradient<false>(g, grad, part,
                         [&](const MaskGradient<false>& gradient, int64_t i, int64_t count) SECATEUR_INLINED {
        const V by_score = gradient.by_score(V{});
        summed.add(by_score, V{});  // zero past the end, where the gradient read is zero
        write(out + i, gradient.by_weight(by_score), count);
    });
    summed.flush();
    return summed.sums;
}

inline Sums sums_of(const Gate& g, const float* grad, const GatePart& part) {
    RunningSums summed;
    each_gradient<true>(g, grad, part,
                        [&](const MaskGradient<true>& gradient, int64_t, int64_t count)
                            SECATEUR_INLINED { summed.add(only(gradient.product(), count), only(gradient.k, count)); });
    summed.flush();
    return summed.sums;
}

inline void finish_solved(const Gate& g, const float* grad, float* out, const GatePart& part, const Sums& sums) {
    const V shift = broadcast<kWidth>(float(sums.products / (sums.slopes < kTiny ? double(kTiny) : sums.slopes)));
    each_gradient<true>(g, grad, part,
                        [&](const MaskGradient<true>& gradient, int64_t i, int64_t count)
                            SECATEUR_INLINED { write(out + i, gradient.by_weight(gradient.by_score(shift)), count); });
}

template <bool Solved>
void gate_rows_backward(const Gate& g, const float* grad, float* out, float* by_threshold) {
    const GateParts parts(g);
    Sums* sums = nullptr;  // of parts, then of rows; not needed where each row is one part
    if (parts.each > 1) sums = static_cast<Sums*>(scratch(kWork, parts.total * int64_t(sizeof(Sums))));
    each_in_parallel(g.threads, parts.total, kEqually, [&](int64_t p, int64_t) {
        const GatePart part = parts[p];
        const Sums own = Solved ? sums_of(g, grad, part) : finish_learned(g, grad, out, part);
        if (sums) sums[p] = own;
        else if (Solved) finish_solved(g, grad, out, part, own);
        else by_threshold[part.row] = float(-own.products);
    });
    if (!sums) return;
    for (int64_t row = 0; row < g.competitions; ++row) {
        Sums& all = sums[row * parts.each];
        for (int64_t p = 1; p < parts.each; ++p) all += sums[row * parts.each + p];
        if (!Solved) by_threshold[row] = float(-all.products);
    }
    if (!Solved) return;
    each_in_parallel(g.threads, parts.total, kEqually, [&](int64_t p, int64_t) {
        finish_solved(g, grad, out, parts[p], sums[p / parts.each * parts.each]);
    });
}

template <bool value> struct Flag { static constexpr bool on = value; };
template <int value> struct Group { static constexpr int size = value; };

// Calls groups(solved, group), shorts() or rows(solved).
template <class Groups, class Shorts, class Rows>
SECATEUR_INLINE void with_mode(const Gate& g, Groups groups, Shorts shorts, Rows rows) {
    if (g.each) return groups(Flag<false>(), Group<1>());
    if (!g.solved) return rows(Flag<false>());
    if (g.units == 1) return groups(Flag<true>(), Group<1>());
    if (g.units == 2) return groups(Flag<true>(), Group<2>());
    if (g.units == 4) return groups(Flag<true>(), Group<4>());
    if constexpr (kWidth >= 8)
        if (g.units == 8) return groups(Flag<true>(), Group<8>());
    if constexpr (kWidth >= 16)
        if (g.units == 16) return groups(Flag<true>(), Group<16>());
    if (g.units <= kGateShort) return shorts();
    rows(Flag<true>());
}

inline void gate(const GateForward& g) {
    with_mode(g, [&](auto solved, auto group) { gate_groups<solved.on, group.size>(g, g.out); },
              [&] { gate_short(g, g.out); }, [&](auto solved) { gate_rows<solved.on>(g, g.out); });
}

inline void gate_backward(const GateBackward& g) {
    with_mode(g, [&](auto solved, auto group) {
        gate_groups_backward<solved.on, group.size>(g, g.grad, g.out, g.by_threshold);
    }, [&] { gate_short_backward(g, g.grad, g.out); }, [&](auto solved) {
        gate_rows_backward<solved.on>(g, g.grad, g.out, g.by_threshold);
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
