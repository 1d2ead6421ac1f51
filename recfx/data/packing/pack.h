// Tables that pack_columns.py fills and the packing kernels read.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

// A block is a table of addresses. Column c's begin at Target::source: values, weights, then one per level of offsets
// (i32 [lists + 1], outermost first).
struct Segment {      // rows [begin, end) of one block
    int64_t sources;  // address of the block's table
    int64_t begin, end;
};

struct Target {  // one column of the batch
    int64_t source;
    int64_t num_levels;  // 0: a fixed-length column
    int64_t itemsize;    // bytes of a value; of a whole row of a fixed-length column
    int64_t capacity;    // values; rows of a fixed-length column
    int64_t values;      // byte in the buffer
    int64_t weights;     // byte in the buffer, -1: none
};

struct Level {         // one level of offsets of the batch, all columns' end to end
    int64_t offsets;   // byte in the buffer
    int64_t capacity;  // lists
};

struct Gap {
    int64_t start, num_bytes;
};

static inline void finish_batch(uint8_t* buffer, const Gap* gaps, int64_t num_gaps, int64_t num_samples_at,
                                int64_t num_rows) {
    for (int64_t g = 0; g < num_gaps; ++g) std::memset(buffer + gaps[g].start, 0, gaps[g].num_bytes);
    const int32_t num_samples = static_cast<int32_t>(num_rows);
    std::memcpy(buffer + num_samples_at, &num_samples, sizeof num_samples);
}
