// Reading the index: rows of all ids, in blocks that hide one cache miss behind the next.
#pragma once
#include "table.h"

constexpr int64_t FIND_BLOCK = 64, FIND_CHUNK = 512;

struct Index {
  const int64_t* slots;
  const int64_t* ids;
  const int64_t* touch;  // prefetched beside ids when not null
  uint64_t mask, salt;
};

static inline void find_block(const Index& index, const Ids& in, int64_t first, int64_t n, int32_t* out) {
  uint64_t hash[FIND_BLOCK], vocabulary[FIND_BLOCK];
  for (int64_t i = 0; i < n; ++i) vocabulary[i] = in.vocabulary(first + i);
  for (int64_t i = 0; i < n; ++i) hash[i] = hash_id(in.id[first + i], vocabulary[i], index.salt);
  for (int64_t i = 0; i < n; ++i) __builtin_prefetch(&index.slots[hash[i] & index.mask]);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t slot = index.slots[hash[i] & index.mask];
    if (slot == EMPTY) continue;
    __builtin_prefetch(&index.ids[slot_row(slot)]);
    if (index.touch) __builtin_prefetch(&index.touch[slot_row(slot)]);
  }
  uint64_t at;
  for (int64_t i = 0; i < n; ++i)
    out[first + i] = (int32_t)probe(index.slots, index.ids, index.mask, hash[i], vocabulary[i], in.id[first + i], &at);
}

// out[k] for every id k; the padding gets UNKNOWN.
static inline void find_all(const Index& index, const Ids& in, int32_t* out) {
  const int64_t count = in.count();
#pragma omp parallel for schedule(static)
  for (int64_t chunk = 0; chunk < count; chunk += FIND_CHUNK) {
    const int64_t end = std::min(chunk + FIND_CHUNK, count);
    for (int64_t k = chunk; k < end; k += FIND_BLOCK) find_block(index, in, k, std::min(FIND_BLOCK, end - k), out);
  }
  std::fill(out + count, out + in.num_positions, UNKNOWN);
}
