// Rows written into a record each, and a batch cut out of records in any order. The definition is in pack_records.py.
//
// A record: i32 lengths of the row's outermost lists | its fixed-length values | for each list what is in it, of a
// nested one the lengths of the inner lists level by level, then the values, then the weights. Lists of 8-byte values
// come first, then those of 4-byte ones, then nested, weighted and byte lists, each in the order of the columns.
#include "data/packing/pack.h"

namespace {

enum Kind { FIXED, WIDE, NARROW, OTHER, NUM_KINDS };

Kind kind_of(const Target& target) {
    if (target.num_levels == 0) return FIXED;
    if (target.num_levels > 1 || target.weights >= 0 || target.itemsize < 4) return OTHER;
    return target.itemsize == 8 ? WIDE : NARROW;
}

template <class T>
T read(const uint8_t* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// Source of a column's rows while records are written.
struct Source {
    const uint8_t *values, *weights;
    const int32_t* const* offsets;  // per level
    int64_t num_levels, itemsize;
};

std::vector<Source> sources_of(Kind kind, const int64_t* sources, const Target* targets, int64_t num_columns) {
    std::vector<Source> found;
    for (int64_t c = 0; c < num_columns; ++c) {
        const Target& t = targets[c];
        if (kind_of(t) != kind) continue;
        const auto addresses = reinterpret_cast<const uint8_t* const*>(sources + t.source);
        const uint8_t* weights = t.weights >= 0 ? addresses[1] : nullptr;
        found.push_back({addresses[0], weights, reinterpret_cast<const int32_t* const*>(addresses + 2), t.num_levels,
                         t.itemsize});
    }
    return found;
}

int64_t bytes_of_other(const Source& source, int64_t row) {
    int64_t num_bytes = 0, begin = row, end = row + 1;
    for (int64_t l = 0; l < source.num_levels; ++l) {
        if (l) num_bytes += 4 * (end - begin);
        begin = source.offsets[l][begin], end = source.offsets[l][end];
    }
    return num_bytes + (end - begin) * (source.itemsize + (source.weights ? 4 : 0));
}

uint8_t* write_other(const Source& source, int64_t row, uint8_t* to) {
    int64_t begin = row, end = row + 1;
    for (int64_t l = 0; l < source.num_levels; ++l) {
        const int32_t* offsets = source.offsets[l];
        for (int64_t list = begin; l && list < end; ++list, to += 4) {
            const int32_t length = offsets[list + 1] - offsets[list];
            std::memcpy(to, &length, 4);
        }
        begin = offsets[begin], end = offsets[end];
    }
    const int64_t num_bytes = (end - begin) * source.itemsize, weight_bytes = source.weights ? 4 * (end - begin) : 0;
    if (num_bytes) std::memcpy(to, source.values + begin * source.itemsize, num_bytes);
    if (weight_bytes) std::memcpy(to + num_bytes, source.weights + 4 * begin, weight_bytes);
    return to + num_bytes + weight_bytes;
}

// Writes what is in the lists of some rows, and moves `at`, where each row's record goes on.
//
// One item is copied whether there is one or not: where lists hold 0 or 1 items at random, a branch would be mispredicted.
// It may fall on the first 8 bytes of the next record, whose lengths and fixed values are therefore written last.
template <class Item>
void write_plain(const std::vector<Source>& sources, int64_t first_row, int64_t n, int64_t num_rows, uint8_t** at) {
    for (const Source& source : sources) {
        const int32_t* offsets = source.offsets[0] + first_row;
        const int32_t last = source.offsets[0][num_rows];
        for (int64_t i = 0; i < n; ++i) {
            const int32_t begin = offsets[i], length = offsets[i + 1] - begin;
            const uint8_t* from = source.values + begin * sizeof(Item);
            if (begin < last) std::memcpy(at[i], from, sizeof(Item));
            if (length > 1) std::memcpy(at[i], from, length * sizeof(Item));
            at[i] += length * sizeof(Item);
        }
    }
}

// Target of a column's rows while a batch is filled. Of a column without room only the items are counted.
template <class Item>
struct Plain {
    Item* values;
    int32_t* offsets;
    int64_t capacity, count;
};

struct Nested {
    uint8_t *values, *weights;
    int64_t num_levels, itemsize, capacity;
    std::vector<int32_t*> offsets;
    std::vector<int64_t> num_lists, counts;  // room for lists, and items so far, per level
};

struct Fixed {
    uint8_t* values;
    int64_t num_bytes;
};

template <class Item>
const uint8_t* fill_plain(std::vector<Plain<Item>>& columns, int64_t row, const uint8_t* lengths, const uint8_t* from) {
    for (Plain<Item>& column : columns) {
        const int32_t length = read<int32_t>(lengths);
        const int64_t end = column.count + length;
        Item* to = column.values + column.count;
        if (column.count < column.capacity) std::memcpy(to, from, sizeof(Item));  // see write_plain
        if (length > 1 && end <= column.capacity) std::memcpy(to, from, length * sizeof(Item));
        column.offsets[row + 1] = static_cast<int32_t>(end);
        column.count = end;
        lengths += 4, from += length * sizeof(Item);
    }
    return from;
}

const uint8_t* fill_nested(Nested& column, int64_t row, int64_t num_lists, const uint8_t* from) {
    int64_t list = row, length = num_lists, n = 1;
    for (int64_t l = 0; l < column.num_levels; ++l) {
        const bool has_room = list + n <= column.num_lists[l];
        int64_t end = column.counts[l];
        for (int64_t k = 0; k < n; ++k) {
            if (l) length = read<int32_t>(from), from += 4;
            end += length;
            if (has_room) column.offsets[l][list + k + 1] = static_cast<int32_t>(end);
        }
        list = column.counts[l], n = end - list;
        column.counts[l] = end;
    }
    const int64_t num_bytes = n * column.itemsize, weight_bytes = column.weights ? 4 * n : 0;
    if (list + n <= column.capacity) {
        std::memcpy(column.values + list * column.itemsize, from, num_bytes);
        if (column.weights) std::memcpy(column.weights + 4 * list, from + num_bytes, weight_bytes);
    }
    return from + num_bytes + weight_bytes;
}

const uint8_t* fill_fixed(const std::vector<Fixed>& columns, int64_t row, const uint8_t* from) {
    for (const Fixed& column : columns) {
        uint8_t* to = column.values + row * column.num_bytes;
        for (int64_t b = 0; b < column.num_bytes; b += 4) std::memcpy(to + b, from + b, 4);
        from += column.num_bytes;
    }
    return from;
}

// A batch while it is filled.
struct Filling {
    std::vector<Fixed> fixed;
    std::vector<Plain<int64_t>> wide;
    std::vector<Plain<int32_t>> narrow;
    std::vector<Nested> other;
    int64_t num_lists = 0;  // outermost lists of a row

    Filling(uint8_t* buffer, const Target* targets, int64_t num_columns, const Level* levels) {
        for (int64_t c = 0; c < num_columns; levels += targets[c++].num_levels) {
            const Target& t = targets[c];
            uint8_t* values = buffer + t.values;
            const auto offsets = [&](int64_t l) { return reinterpret_cast<int32_t*>(buffer + levels[l].offsets); };
            num_lists += t.num_levels > 0;
            switch (kind_of(t)) {
                case FIXED: fixed.push_back({values, t.itemsize}); break;
                case WIDE: wide.push_back({reinterpret_cast<int64_t*>(values), offsets(0), t.capacity, 0}); break;
                case NARROW: narrow.push_back({reinterpret_cast<int32_t*>(values), offsets(0), t.capacity, 0}); break;
                default: {
                    uint8_t* weights = t.weights >= 0 ? buffer + t.weights : nullptr;
                    Nested column = {values, weights, t.num_levels, t.itemsize, t.capacity, {}, {}, {}};
                    for (int64_t l = 0; l < t.num_levels; ++l) {
                        column.offsets.push_back(offsets(l));
                        column.num_lists.push_back(levels[l].capacity);
                        column.counts.push_back(0);
                    }
                    other.push_back(column);
                }
            }
        }
    }

    void add(const uint8_t* record, int64_t row) {
        const uint8_t* lengths = record;
        const uint8_t* from = fill_fixed(fixed, row, record + 4 * num_lists);
        from = fill_plain(wide, row, lengths, from);
        from = fill_plain(narrow, row, lengths += 4 * wide.size(), from);
        lengths += 4 * narrow.size();
        for (Nested& column : other) {
            from = fill_nested(column, row, read<int32_t>(lengths), from);
            lengths += 4;
        }
    }

    // Items per level, over all levels of all columns.
    void count(const Target* targets, int64_t num_columns, int64_t* counts) const {
        size_t next[NUM_KINDS] = {};
        for (int64_t c = 0; c < num_columns; ++c) {
            const Kind kind = kind_of(targets[c]);
            const size_t i = next[kind]++;
            if (kind == WIDE) *counts++ = wide[i].count;
            if (kind == NARROW) *counts++ = narrow[i].count;
            if (kind == OTHER) counts = std::copy(other[i].counts.begin(), other[i].counts.end(), counts);
        }
    }
};

constexpr int64_t PIECE = 256;           // rows that are written column by column, in the processor's cache
constexpr int64_t AHEAD = 4;             // records
constexpr int64_t MAX_PREFETCHED = 1024;  // bytes of a record; what follows comes by itself

}  // namespace

extern "C" {

// starts[r] = byte at which row r's record begins, starts[num_rows] = number of bytes, 8 of them after the last record.
void recfx_record_starts(const int64_t* sources, const Target* targets, int64_t num_columns, int64_t num_rows,
                         int64_t* starts) {
    std::fill(starts, starts + num_rows + 1, int64_t{0});
    int64_t same = 0;  // bytes that every record has
    for (int64_t c = 0; c < num_columns; ++c) same += targets[c].num_levels ? 4 : targets[c].itemsize;
    for (const Kind kind : {WIDE, NARROW}) {
        for (const Source& source : sources_of(kind, sources, targets, num_columns)) {
            const int32_t* offsets = source.offsets[0];
            for (int64_t r = 0; r < num_rows; ++r) starts[r + 1] += (offsets[r + 1] - offsets[r]) * source.itemsize;
        }
    }
    for (const Source& source : sources_of(OTHER, sources, targets, num_columns)) {
        for (int64_t r = 0; r < num_rows; ++r) starts[r + 1] += bytes_of_other(source, r);
    }
    for (int64_t r = 0; r < num_rows; ++r) starts[r + 1] += starts[r] + same;
    if (num_rows) starts[num_rows] += 8;
}

void recfx_write_records(const int64_t* sources, const Target* targets, int64_t num_columns, int64_t num_rows,
                         const int64_t* starts, uint8_t* records) {
    std::vector<Source> columns[NUM_KINDS], lists;
    int64_t fixed_bytes = 0;
    for (const Kind kind : {FIXED, WIDE, NARROW, OTHER}) {
        columns[kind] = sources_of(kind, sources, targets, num_columns);
        if (kind != FIXED) lists.insert(lists.end(), columns[kind].begin(), columns[kind].end());
    }
    for (const Source& fixed : columns[FIXED]) fixed_bytes += fixed.itemsize;
    const int64_t header_bytes = 4 * lists.size() + fixed_bytes;
    uint8_t* at[PIECE];
    for (int64_t first = 0; first < num_rows; first += PIECE) {
        const int64_t n = std::min(PIECE, num_rows - first);
        for (int64_t i = 0; i < n; ++i) at[i] = records + starts[first + i] + header_bytes;
        write_plain<int64_t>(columns[WIDE], first, n, num_rows, at);
        write_plain<int32_t>(columns[NARROW], first, n, num_rows, at);
        for (const Source& other : columns[OTHER]) {
            for (int64_t i = 0; i < n; ++i) at[i] = write_other(other, first + i, at[i]);
        }
        for (int64_t i = 0; i < n; ++i) at[i] = records + starts[first + i];
        for (const Source& list : lists) {
            const int32_t* offsets = list.offsets[0] + first;
            for (int64_t i = 0; i < n; ++i) {
                const int32_t length = offsets[i + 1] - offsets[i];
                std::memcpy(at[i], &length, 4);
                at[i] += 4;
            }
        }
        for (const Source& fixed : columns[FIXED]) {
            const uint8_t* from = fixed.values + first * fixed.itemsize;
            for (int64_t i = 0; i < n; ++i) {
                std::memcpy(at[i], from + i * fixed.itemsize, fixed.itemsize);
                at[i] += fixed.itemsize;
            }
        }
    }
    if (num_rows) std::memset(records + starts[num_rows] - 8, 0, 8);
}

// counts[l] = number of items of level l, over all levels of all columns. Where one exceeds the capacity, the buffer is
// of no use; otherwise every byte of it is written.
void recfx_pack_records(uint8_t* buffer, const uint8_t* const* records, int64_t num_rows, int64_t record_bytes,
                        const Target* targets, int64_t num_columns, const Level* levels, int64_t* counts,
                        const Gap* gaps, int64_t num_gaps, int64_t num_samples_at) {
    Filling batch(buffer, targets, num_columns, levels);
    const int64_t prefetched = std::min(record_bytes, MAX_PREFETCHED);
    for (int64_t row = 0; row < num_rows; ++row) {
        if (row + AHEAD < num_rows) {
            for (int64_t b = 0; b < prefetched; b += 64) __builtin_prefetch(records[row + AHEAD] + b);
        }
        batch.add(records[row], row);
    }
    batch.count(targets, num_columns, counts);
    for (int64_t c = 0; c < num_columns; ++c) {
        const Target& target = targets[c];
        int64_t n = num_rows;  // lists of the level, or values
        for (int64_t l = 0; l < target.num_levels; n = *counts++, ++l, ++levels) {
            if (n > levels->capacity) return;
            int32_t* offsets = reinterpret_cast<int32_t*>(buffer + levels->offsets);
            offsets[0] = 0;
            std::fill(offsets + n + 1, offsets + levels->capacity + 1, static_cast<int32_t>(*counts));
        }
        if (n > target.capacity) return;
        std::memset(buffer + target.values + n * target.itemsize, 0, (target.capacity - n) * target.itemsize);
        if (target.weights >= 0) std::memset(buffer + target.weights + 4 * n, 0, 4 * (target.capacity - n));
    }
    finish_batch(buffer, gaps, num_gaps, num_samples_at, num_rows);
}

}  // extern "C"
