// Cuts a batch out of decoded column blocks. Called through ctypes, which lets go of the GIL meanwhile.
// The definition is pack_columns_reference in pack_columns.py; the tables below are filled there.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

enum Kind : int64_t { kF64 = 0, kF32 = 1, kI64 = 2 };

struct Source {       // one column of one block
    int64_t values;   // address
    int64_t offsets;  // address of i32 [rows + 1]
    int64_t kind;     // Kind of the values
};

struct Segment {      // rows [begin, end) of one block
    int64_t sources;  // address of Source [columns]
    int64_t begin, end;
};

struct Target {         // one column of the batch
    int64_t values;     // byte in the buffer
    int64_t offsets;    // byte in the buffer; -1: a fixed-length column
    int64_t num_bytes;  // of the values, padding included
    int64_t itemsize;
    int64_t width;     // items a row, of a fixed-length column
    int64_t defaults;  // address of f32 [width]
};

struct Gap {
    int64_t start, num_bytes;
};

const Source& source_of(const Segment& segment, int64_t column) {
    return reinterpret_cast<const Source*>(segment.sources)[column];
}

const int32_t* offsets_of(const Source& source) { return reinterpret_cast<const int32_t*>(source.offsets); }

void copy_values(const Source& source, int64_t first, int64_t n, uint8_t* to) {
    if (source.kind == kF64) {
        const double* from = reinterpret_cast<const double*>(source.values) + first;
        float* numbers = reinterpret_cast<float*>(to);
        for (int64_t i = 0; i < n; ++i) numbers[i] = static_cast<float>(from[i]);
    } else {
        const int64_t itemsize = source.kind == kF32 ? 4 : 8;
        std::memcpy(to, reinterpret_cast<const uint8_t*>(source.values) + first * itemsize, n * itemsize);
    }
}

// Returns the number of bytes written to the values.
int64_t pack_ragged(uint8_t* buffer, const Target& target, const Segment* segments, int64_t num_segments,
                    int64_t column, int64_t batch_size) {
    int32_t* offsets = reinterpret_cast<int32_t*>(buffer + target.offsets);
    int64_t row = 0, position = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
        const Segment& segment = segments[s];
        const Source& source = source_of(segment, column);
        const int32_t* from = offsets_of(source);
        const int64_t first = from[segment.begin], n = from[segment.end] - first;
        const int32_t shift = static_cast<int32_t>(position - first);
        for (int64_t r = segment.begin; r < segment.end; ++r) offsets[row++] = from[r] + shift;
        copy_values(source, first, n, buffer + target.values + position * target.itemsize);
        position += n;
    }
    std::fill(offsets + row, offsets + batch_size + 1, static_cast<int32_t>(position));
    return position * target.itemsize;
}

int64_t pack_fixed(uint8_t* buffer, const Target& target, const Segment* segments, int64_t num_segments,
                   int64_t column) {
    const int64_t row_bytes = target.width * target.itemsize;
    const void* defaults = reinterpret_cast<const void*>(target.defaults);
    int64_t written = 0;
    for (int64_t s = 0; s < num_segments; ++s) {
        const Source& source = source_of(segments[s], column);
        const int32_t* from = offsets_of(source);
        for (int64_t r = segments[s].begin; r < segments[s].end; ++r, written += row_bytes) {
            uint8_t* to = buffer + target.values + written;
            if (from[r] == from[r + 1]) {
                std::memcpy(to, defaults, row_bytes);
            } else {
                copy_values(source, from[r], target.width, to);
            }
        }
    }
    return written;
}

}  // namespace

extern "C" {

// counts[c] = number of values of column c in the segments.
void recfx_count_values(const Segment* segments, int64_t num_segments, int64_t num_columns, int64_t* counts) {
    std::fill(counts, counts + num_columns, int64_t{0});
    for (int64_t s = 0; s < num_segments; ++s) {
        for (int64_t c = 0; c < num_columns; ++c) {
            const int32_t* offsets = offsets_of(source_of(segments[s], c));
            counts[c] += offsets[segments[s].end] - offsets[segments[s].begin];
        }
    }
}

// Writes every byte of the buffer; the caller has checked that the values fit.
void recfx_pack_columns(uint8_t* buffer, const Segment* segments, int64_t num_segments, const Target* targets,
                        int64_t num_columns, const Gap* gaps, int64_t num_gaps, int64_t batch_size,
                        int64_t num_samples_at) {
    for (int64_t c = 0; c < num_columns; ++c) {
        const Target& target = targets[c];
        const int64_t written = target.offsets < 0
                                    ? pack_fixed(buffer, target, segments, num_segments, c)
                                    : pack_ragged(buffer, target, segments, num_segments, c, batch_size);
        std::memset(buffer + target.values + written, 0, target.num_bytes - written);
    }
    for (int64_t g = 0; g < num_gaps; ++g) std::memset(buffer + gaps[g].start, 0, gaps[g].num_bytes);
    int32_t num_samples = 0;
    for (int64_t s = 0; s < num_segments; ++s) num_samples += segments[s].end - segments[s].begin;
    std::memcpy(buffer + num_samples_at, &num_samples, sizeof num_samples);
}

}  // extern "C"
