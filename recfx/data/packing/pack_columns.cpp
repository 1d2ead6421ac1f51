// Cuts a batch out of decoded column blocks. Called through ctypes, which lets go of the GIL meanwhile.
// The definition is pack_columns_reference in pack_columns.py; the tables below are filled there.

#include "data/packing/pack.h"

namespace {

struct Range {
    int64_t begin, end;
};

int64_t address_of(const Segment& segment, int64_t at) {
    return reinterpret_cast<const int64_t*>(segment.sources)[at];
}

const int32_t* offsets_of(const Segment& segment, const Target& target, int64_t level) {
    return reinterpret_cast<const int32_t*>(address_of(segment, target.source + 2 + level));
}

void copy_shifted(int32_t* __restrict to, const int32_t* __restrict from, int64_t n, int32_t shift) {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i] + shift;
}

// Writes the offsets of one level and replaces each range of lists by the range of what they hold.
void pack_level(uint8_t* buffer, const Segment* segments, const Target& target, int64_t l, const Level& level,
                std::vector<Range>& ranges) {
    int32_t* offsets = reinterpret_cast<int32_t*>(buffer + level.offsets);
    int64_t list = 0, position = 0;
    for (size_t s = 0; s < ranges.size(); ++s) {
        Range& range = ranges[s];
        const int32_t* from = offsets_of(segments[s], target, l);
        const int64_t n = range.end - range.begin, first = from[range.begin], last = from[range.end];
        copy_shifted(offsets + list, from + range.begin, n, static_cast<int32_t>(position - first));
        list += n;
        position += last - first;
        range = {first, last};
    }
    std::fill(offsets + list, offsets + level.capacity + 1, static_cast<int32_t>(position));
}

void pack_items(uint8_t* to, const Segment* segments, int64_t source, int64_t itemsize, int64_t capacity,
                const std::vector<Range>& ranges) {
    uint8_t* const end = to + capacity * itemsize;
    for (size_t s = 0; s < ranges.size(); ++s) {
        const int64_t num_bytes = (ranges[s].end - ranges[s].begin) * itemsize;
        if (num_bytes == 0) continue;
        const uint8_t* from = reinterpret_cast<const uint8_t*>(address_of(segments[s], source));
        std::memcpy(to, from + ranges[s].begin * itemsize, num_bytes);
        to += num_bytes;
    }
    std::memset(to, 0, end - to);
}

}  // namespace

extern "C" {

// counts[l] = number of items that the lists of level l hold in the segments, over all levels of all columns.
void recfx_count_items(const Segment* segments, int64_t num_segments, const Target* targets, int64_t num_columns,
                       int64_t* counts) {
    for (int64_t c = 0; c < num_columns; counts += targets[c++].num_levels) {
        std::fill(counts, counts + targets[c].num_levels, int64_t{0});
        for (int64_t s = 0; s < num_segments; ++s) {
            Range range = {segments[s].begin, segments[s].end};
            for (int64_t l = 0; l < targets[c].num_levels; ++l) {
                const int32_t* offsets = offsets_of(segments[s], targets[c], l);
                range = {offsets[range.begin], offsets[range.end]};
                counts[l] += range.end - range.begin;
            }
        }
    }
}

// Writes every byte of the buffer; the caller has checked that the items fit.
void recfx_pack_columns(uint8_t* buffer, const Segment* segments, int64_t num_segments, const Target* targets,
                        int64_t num_columns, const Level* levels, const Gap* gaps, int64_t num_gaps,
                        int64_t num_samples_at) {
    std::vector<Range> ranges(num_segments);
    for (int64_t c = 0; c < num_columns; ++c) {
        const Target& target = targets[c];
        for (int64_t s = 0; s < num_segments; ++s) ranges[s] = {segments[s].begin, segments[s].end};
        for (int64_t l = 0; l < target.num_levels; ++l) pack_level(buffer, segments, target, l, *levels++, ranges);
        pack_items(buffer + target.values, segments, target.source, target.itemsize, target.capacity, ranges);
        if (target.weights >= 0) {
            pack_items(buffer + target.weights, segments, target.source + 1, sizeof(float), target.capacity, ranges);
        }
    }
    int64_t num_rows = 0;
    for (int64_t s = 0; s < num_segments; ++s) num_rows += segments[s].end - segments[s].begin;
    finish_batch(buffer, gaps, num_gaps, num_samples_at, num_rows);
}

}  // extern "C"
