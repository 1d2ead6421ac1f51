// Rebuilds the index over `num_slots` slots from the rows themselves: the old index is not read, so it needs no copy.
//
// Rows are sorted by the part of the index that they begin in, a block of rows at a time; then one thread fills a part.
// What runs over a part's end is placed afterwards, in order: the same bytes whatever the number of threads.
#include <vector>

#include "kernels/kernels.h"

namespace {

constexpr int PARTS_LOG2 = 8;
constexpr int64_t PARTS = 1 << PARTS_LOG2, CHUNK = 1 << 13, BLOCK = 128 * CHUNK, AHEAD = 24;

struct Rows {
  const int64_t* ids;
  const int32_t* vocabularies;
  uint64_t salt;
  uint64_t hash(int64_t row) const { return hash_id(ids[row], (uint64_t)vocabularies[row], salt); }
  int64_t slot(int64_t row, uint64_t hash) const { return make_slot(slot_head(hash, vocabularies[row]), row); }
  template <class F>
  void each(int64_t first, int64_t end, F f) const {
    for (int64_t row = first; row < end; ++row)
      if (vocabularies[row] != FREED) f(row, hash(row));
  }
};

struct Index {
  int64_t* slots;
  uint64_t mask;
  int shift;  // of a place to its part
  int64_t part(uint64_t hash) const { return (int64_t)((hash & mask) >> shift); }

  // Puts a slot into its part of the index, if its run has room there.
  bool put(int64_t slot, uint64_t home) const {
    const uint64_t end = std::min(home + RUN, ((home >> shift) + 1) << shift);
    for (uint64_t p = home; p < end; ++p)
      if (slots[p] == EMPTY) {
        slots[p] = slot;
        return true;
      }
    return false;
  }
};

}  // namespace

EXPORT void rehash(int64_t* slots, int64_t* num_crowded, const int64_t* ids, const int32_t* row_vocabularies,
                   int64_t num_rows, int64_t num_slots, int64_t salt) {
  const Rows rows{ids, row_vocabularies, (uint64_t)salt};
  const Index index{slots, (uint64_t)num_slots - 1, std::max(0, 63 - __builtin_clzll(num_slots) - PARTS_LOG2)};
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < num_slots; ++i) slots[i] = EMPTY;

  const int64_t most = std::min(num_rows, BLOCK);
  std::vector<int64_t> slot(most), ends((BLOCK / CHUNK) * PARTS), part_ends(PARTS);
  std::vector<uint32_t> home(most);
  std::vector<std::vector<int64_t>> left(PARTS);
  int64_t crowded = 0;
  for (int64_t block = 0; block < num_rows; block += BLOCK) {
    const int64_t chunks = (std::min(BLOCK, num_rows - block) + CHUNK - 1) / CHUNK;
    const auto end_of = [&](int64_t chunk) { return std::min(block + (chunk + 1) * CHUNK, num_rows); };
    std::fill(ends.begin(), ends.end(), 0);
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      rows.each(block + c * CHUNK, end_of(c), [&](int64_t, uint64_t hash) { ++ends[c * PARTS + index.part(hash)]; });
    int64_t begin = 0;
    for (int64_t p = 0; p < PARTS; ++p) {
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t count = ends[c * PARTS + p];
        ends[c * PARTS + p] = begin;
        begin += count;
      }
      part_ends[p] = begin;
    }
#pragma omp parallel for schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      rows.each(block + c * CHUNK, end_of(c), [&](int64_t row, uint64_t hash) {
        const int64_t k = ends[c * PARTS + index.part(hash)]++;
        slot[k] = rows.slot(row, hash);
        home[k] = (uint32_t)(hash & index.mask);
      });
#pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < PARTS; ++p) {
      left[p].clear();
      for (int64_t k = p ? part_ends[p - 1] : 0; k < part_ends[p]; ++k) {
        __builtin_prefetch(&slots[home[std::min(k + AHEAD, part_ends[p] - 1)]], 1);
        if (!index.put(slot[k], home[k])) left[p].push_back(slot_row(slot[k]));
      }
    }
    for (const auto& part : left)
      for (const int64_t row : part) {
        const uint64_t hash = rows.hash(row), at = probe_empty(slots, index.mask, hash);
        slots[at] = rows.slot(row, hash);
        crowded += is_crowded(at, hash, index.mask);
      }
  }
  *num_crowded = crowded;
}
