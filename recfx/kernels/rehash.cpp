// Rebuilds the index over `num_slots` slots from the rows themselves: the old index is not read, so it needs no copy.
#include <algorithm>

#include "table.h"

EXPORT void rehash(int64_t* slots, int64_t* num_crowded, const int64_t* ids, const int32_t* row_vocabularies,
                   int64_t num_rows, int64_t num_slots, int64_t salt) {
  constexpr int64_t BLOCK = 64;
  const uint64_t mask = (uint64_t)num_slots - 1;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < num_slots; ++i) slots[i] = EMPTY;
  uint64_t hash[BLOCK];
  int64_t crowded = 0;
  for (int64_t first = 0; first < num_rows; first += BLOCK) {
    const int64_t n = std::min(BLOCK, num_rows - first);
    for (int64_t i = 0; i < n; ++i) {
      hash[i] = hash_id(ids[first + i], row_vocabularies[first + i], (uint64_t)salt);
      __builtin_prefetch(&slots[hash[i] & mask], 1);
    }
    for (int64_t i = 0; i < n; ++i) {
      if (row_vocabularies[first + i] == FREED) continue;
      const uint64_t at = probe_empty(slots, mask, hash[i]);
      slots[at] = make_slot(slot_head(hash[i], row_vocabularies[first + i]), first + i);
      crowded += is_crowded(at, hash[i], mask);
    }
  }
  *num_crowded = crowded;
}
