// Units of several weights: what the differentiable mask does for each weight of a matrix that is cut into units of
// height x width, without remainder.
#pragma once
#include <cstdint>

#include "fields.h"

namespace secateur {

struct Units {
    int64_t rows, columns, height, width;
    int threads;

    using Members = Fields<&Units::rows, &Units::columns, &Units::height, &Units::width, &Units::threads>;
};

// The sum of a * b over each unit.
struct UnitSums : Units {
    const float *a, *b;  // [rows, columns]
    float* out;          // [rows / height, columns / width]

    using Members = Units::Members::And<&UnitSums::a, &UnitSums::b, &UnitSums::out>;
};

// a times one number for each unit, plus b times another if there is b.
struct TimesUnits : Units {
    const float *a, *b;        // [rows, columns]; b may be null
    const float *by_a, *by_b;  // [rows / height, columns / width]
    float* out;                // [rows, columns]; may be a

    using Members =
        Units::Members::And<&TimesUnits::a, &TimesUnits::by_a, &TimesUnits::b, &TimesUnits::by_b, &TimesUnits::out>;
};

}  // namespace secateur

#if defined(SECATEUR_ISA)
#include "parts.h"
#include "simd/vector.h"

namespace secateur::SECATEUR_ISA {

constexpr int64_t kUnitPart = 1 << 10;  // columns that a thread takes at a time, a multiple of every unit's width

inline void unit_sums(const UnitSums& u) {
    const float *a = u.a, *b = u.b;
    float* out = u.out;
    const int64_t down = u.rows / u.height, across = u.columns / u.width, each = kUnitPart / u.width * u.width;
    each_in_parallel(u.threads, down, kEqually, [&](int64_t i, int64_t) {
        for (int64_t first = 0; first < u.columns; first += each) {
            const int64_t columns = least(each, u.columns - first), start = i * u.height * u.columns + first;
            float sums[kUnitPart];
            each_vector(columns, [&](int64_t c, int64_t count) SECATEUR_INLINED {
                V sum = {};
                for (int64_t h = 0; h < u.height; ++h) {
                    const int64_t at = start + h * u.columns + c;
                    sum += read(a + at, count) * read(b + at, count);
                }
                write(sums + c, sum, count);
            });
            float* to = out + i * across + first / u.width;
            for (int64_t c = 0; c < columns; c += u.width, ++to) {
                float sum = 0;
                for (int64_t w = 0; w < u.width; ++w) sum += sums[c + w];
                *to = sum;
            }
        }
    });
}

inline void times_units(const TimesUnits& u) {
    const float *a = u.a, *by_a = u.by_a, *b = u.b, *by_b = u.by_b;
    float* out = u.out;
    const int64_t down = u.rows / u.height, across = u.columns / u.width, each = kUnitPart / u.width * u.width;
    each_in_parallel(u.threads, down, kEqually, [&](int64_t i, int64_t) {
        for (int64_t first = 0; first < u.columns; first += each) {
            const int64_t columns = least(each, u.columns - first), start = i * u.height * u.columns + first;
            const int64_t unit = i * across + first / u.width;
            float wide_a[kUnitPart], wide_b[kUnitPart];
            for (int64_t c = 0; c < columns; ++c) wide_a[c] = by_a[unit + c / u.width];
            if (b)
                for (int64_t c = 0; c < columns; ++c) wide_b[c] = by_b[unit + c / u.width];
            for (int64_t h = 0; h < u.height; ++h)
                each_vector(columns, [&](int64_t c, int64_t count) SECATEUR_INLINED {
                    const int64_t at = start + h * u.columns + c;
                    V v = read(a + at, count) * read(wide_a + c, count);
                    if (b) v += read(b + at, count) * read(wide_b + c, count);
                    write(out + at, v, count);
                });
        }
    });
}

}  // namespace secateur::SECATEUR_ISA
#endif
