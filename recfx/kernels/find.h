// Reading the index: rows of all positions, in blocks that hide one cache miss behind the next.
#pragma once
#include <algorithm>
#include <vector>

#include "table.h"

constexpr int64_t FIND_BLOCK = 64, FIND_CHUNK = 512;

struct Index {
  const int64_t* slots;
  const int64_t* ids;
  const int64_t* touch;  // prefetched beside ids when not null
  uint64_t mask, salt;
};

static inline void find_block(const Index& index, const int64_t* values, int64_t n, uint64_t vocabulary, int32_t* out) {
  uint64_t hash[FIND_BLOCK];
  for (int64_t i = 0; i < n; ++i) hash[i] = hash_id(values[i], vocabulary, index.salt);
  for (int64_t i = 0; i < n; ++i) __builtin_prefetch(&index.slots[hash[i] & index.mask]);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = index.slots[hash[i] & index.mask];
    if (slot == EMPTY) continue;
    __builtin_prefetch(&index.ids[slot_row(slot)]);
    if (index.touch) __builtin_prefetch(&index.touch[slot_row(slot)]);
  }
  uint64_t at;
  for (int64_t i = 0; i < n; ++i)
    out[i] = (int32_t)probe(index.slots, index.ids, index.mask, hash[i], vocabulary, values[i], &at);
}

// out[p] for every valid position p; other positions keep what they hold.
static inline void find_all(const Index& index, const Lookups& in, int32_t* out) {
  std::vector<int64_t> first_chunk(in.num_lookups + 1, 0);
  for (int64_t l = 0; l < in.num_lookups; ++l)
    first_chunk[l + 1] = first_chunk[l] + (in.count(l) + FIND_CHUNK - 1) / FIND_CHUNK;
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < first_chunk[in.num_lookups]; ++chunk) {
    const int64_t l = std::upper_bound(first_chunk.begin(), first_chunk.end(), chunk) - first_chunk.begin() - 1;
    const int64_t begin = (chunk - first_chunk[l]) * FIND_CHUNK, end = std::min(begin + FIND_CHUNK, in.count(l));
    for (int64_t i = begin; i < end; i += FIND_BLOCK)
      find_block(index, in.values + in.starts[l] + i, std::min(FIND_BLOCK, end - i), in.vocabularies[l],
                 out + in.starts[l] + i);
  }
}
