// Reading the index: rows of all ids, in blocks whose cache misses overlap.
#pragma once
#include <omp.h>

#include "table.h"

struct Index {
  const int64_t* slots;
  const int64_t* ids;
  uint64_t mask, salt;
};

// One block of ids on its way: hashed, then its slots seen, then its rows known. Each stage prefetches for the next.
struct FindBlock {
  static constexpr int64_t SIZE = 32;
  uint64_t hash[SIZE], vocabulary[SIZE];
  int64_t first, n;

  void hash_ids(const Index& index, const Ids& in, int64_t begin, int64_t end) {
    first = begin, n = std::max<int64_t>(0, std::min(SIZE, end - begin));
    for (int64_t i = 0; i < n; ++i) vocabulary[i] = in.vocabulary(first + i);
    for (int64_t i = 0; i < n; ++i) hash[i] = hash_id(in.id[first + i], vocabulary[i], index.salt);
    for (int64_t i = 0; i < n; ++i) __builtin_prefetch(&index.slots[hash[i] & index.mask]);
  }

  void see_slots(const Index& index) const {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t slot = load_slot(index.slots + (hash[i] & index.mask));
      __builtin_prefetch(&index.ids[slot == EMPTY ? 0 : slot_row(slot)]);
    }
  }

  void find(const Index& index, const Ids& in, int32_t* out) const {
    uint64_t at;
    for (int64_t i = 0; i < n; ++i)
      out[first + i] =
          (int32_t)probe(index.slots, index.ids, index.mask, hash[i], vocabulary[i], in.id[first + i], &at);
  }
};

// out[k] of the ids [begin, end); after each block, `found(k)` is told that all before k are known.
template <class F>
static inline void find_range(const Index& index, const Ids& in, int64_t begin, int64_t end, int32_t* out, F found) {
  constexpr int64_t SIZE = FindBlock::SIZE;
  FindBlock blocks[3];
  blocks[0].hash_ids(index, in, begin, end);
  blocks[1].hash_ids(index, in, begin + SIZE, end);
  blocks[0].see_slots(index);
  for (int64_t k = begin, b = 0; k < end; k += SIZE, ++b) {
    blocks[(b + 2) % 3].hash_ids(index, in, k + 2 * SIZE, end);
    blocks[(b + 1) % 3].see_slots(index);
    blocks[b % 3].find(index, in, out);
    found(std::min(k + SIZE, end));
  }
}

// out[k] for every id k; the padding gets UNKNOWN.
static inline void find_all(const Index& index, const Ids& in, int32_t* out) {
  const int64_t count = in.count();
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    find_range(index, in, count * me / threads, count * (me + 1) / threads, out, [](int64_t) {});
  }
  std::fill(out + count, out + in.num_positions, UNKNOWN);
}
