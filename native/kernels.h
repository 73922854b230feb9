// What an instruction set offers: one table of functions, filled by each isa_*.cpp from the same source.
#pragma once
#include <cstdint>

namespace secateur {

enum ValueType : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kFloat16 = 3 };

// y [batch, rows] = x [batch, columns] times the transposed weight, scaled by row and shifted, row-major.
struct Call {
    const float* x;
    float* y;
    const float* bias;   // [rows] or null
    const float* scale;  // [rows] or null: what int8 values are multiplied by
    const void* values;
    int64_t batch, rows, columns;
    int value_type;
    int threads;
    bool fast_expand;  // the expand instruction costs about as much as a permutation, not five times that as on Zen 4
};

// Rows of packed values; one bit a column says where they stand. Values are readable 16 elements past their end.
struct Bitmask {
    const uint64_t* mask;    // [rows, ceil(columns / 64)]
    const int64_t* offsets;  // [rows + 1] first value of each row
};

// Panels of rows, cut into blocks of columns. Segments [panel, block, row] of values and of columns local to the block.
struct Panels {
    const void* index;       // uint8 or uint16, [nnz]
    const uint16_t* counts;  // [panels, blocks, height], 0 for rows past the end
    const int64_t* offsets;  // [panels * blocks + 1] first value of each panel's block
    int64_t height, width;   // rows of a panel, columns of a block
    int index_bytes;
};

// n of every m consecutive inputs: 16 rows side by side, values [panel, group, slot, 16].
struct Lanes {
    const uint32_t* words;  // [panels, words, 16]: 2 bits a slot for m <= 4, else 4, from the lowest bits up
    int n, m;
};

// Dense blocks, cut into strips of 16, 8, 4, 2 or 1 rows; a strip's values are [block, width, strip rows].
struct Strips {
    const int32_t* block_columns;  // [blocks] index of each block's column of blocks
    const int64_t* block_rows;     // [row blocks + 1] first block of each row of blocks
    int64_t height, width;
};

// The differentiable mask on weights [competitions, units], row-major.
struct Gate {
    const float* weight;
    const float* threshold;  // [competitions], or [competitions, units] if there is one for each weight
    float temperature;
    int64_t competitions, units;
    bool each, solved, hard;
    int threads;
};

// Units of several weights: a matrix cut into blocks of height x width, without remainder.
struct Units {
    int64_t rows, columns, height, width;
    int threads;
};

struct Table {
    const char* name;
    void (*bitmask)(const Call&, const Bitmask&);
    void (*panels)(const Call&, const Panels&);
    void (*lanes)(const Call&, const Lanes&);
    void (*strips)(const Call&, const Strips&);
    void (*gate)(const Gate&, float* out);
    // out may be grad. by_threshold is of the thresholds' shape, and written if they are learned.
    void (*gate_backward)(const Gate&, const float* grad, float* out, float* by_threshold);
    void (*unit_sums)(const Units&, const float* a, const float* b, float* out);
    // b and by_b may be null. out may be a.
    void (*times_units)(const Units&, const float* a, const float* by_a, const float* b, const float* by_b, float* out);
};

extern const Table table_generic;
#if defined(__x86_64__)
extern const Table table_avx2;
extern const Table table_avx512;
#endif

// A buffer of the calling thread, at least `bytes` long and 64-byte aligned, that lives until the next call with the
// same slot. It is never shrunk. Throws std::bad_alloc.
enum Slot : int { kInput = 0, kWork = 1 };
void* scratch(Slot slot, int64_t bytes);

}  // namespace secateur
