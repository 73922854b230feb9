// A packed weight as one block of bytes, which a model file of another engine carries as a constant. docs/format.md
// describes it; src/secateur/kernels/_blob.py writes it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <variant>

#include "runtime.h"

namespace secateur {

class PackedWeight {
public:
    // Reads and checks all of it, because kernels trust the places in a weight. The bytes must outlive this object.
    // Throws std::invalid_argument.
    PackedWeight(const void* data, size_t size);

    int64_t rows() const { return linear().rows; }
    int64_t columns() const { return linear().columns; }

    // y [batch, rows] = x [batch, columns] times the transposed weight, plus the bias [rows] unless it is null.
    void run(const float* x, float* y, const float* bias, int64_t batch, int threads) const;

private:
    const Linear& linear() const;

    std::variant<Bitmask, Panels, Groups, Tiles, Int8Panels, Int8Tiles, Int8Bitmask> weight_;
    int64_t stored_;  // values that a product reads
    const Table* table_;
};

}  // namespace secateur
