// The distinct ids of a batch, in a bucket for each rank. One thread finds what is distinct, in the order of the ids.
#include <vector>

#include "kernels/kernels.h"

namespace {

struct Entry {
  int64_t id;
  int32_t vocabulary, rank, place;  // place -1: its bucket was full
};

// An index of the entries, kept from call to call: a slot of an earlier call is empty.
struct Scratch {
  std::vector<uint64_t> slots = std::vector<uint64_t>(1024), hashes;  // slot: call:16 | tag:16 | entry:32
  std::vector<int32_t> vocabularies;  // of the ids, as `hashes`
  std::vector<Entry> entries;
  std::vector<uint64_t> of_entries;  // their hashes
  uint64_t call = 0;

  void begin(int64_t num_ids) {
    if (++call == 1 << 16) clear(slots.size());
    entries.clear();
    of_entries.clear();
    if (hashes.size() < (uint64_t)num_ids) hashes.resize(num_ids), vocabularies.resize(num_ids);
  }
  void clear(uint64_t size) {
    slots.assign(size, 0);
    call = 1;
  }
  // The slot of an entry with this hash for which `is_it(entry)` holds, or the empty one where it would go.
  template <class F>
  uint64_t find(uint64_t hash, F is_it) const {
    const uint64_t mask = slots.size() - 1, head = call << 16 | hash >> 48;
    for (uint64_t start = hash;; start = next_run(start))
      for (uint64_t k = 0; k < RUN; ++k) {
        const uint64_t at = (start + k) & mask, slot = slots[at];
        if (slot >> 48 != call || (slot >> 32 == head && is_it(slot & 0xffffffffULL))) return at;
      }
  }
  void put(uint64_t at, uint64_t hash, uint64_t entry) { slots[at] = call << 48 | hash >> 48 << 32 | entry; }
  // Twice the slots once half of them are taken: few ids of a batch are distinct, and a small index stays in the cache.
  void add(uint64_t at, uint64_t hash, const Entry& entry) {
    put(at, hash, entries.size());
    entries.push_back(entry);
    of_entries.push_back(hash);
    if (entries.size() * 2 < slots.size()) return;
    clear(slots.size() * 2);
    const auto is_it = [](uint64_t) { return false; };
    for (uint64_t e = 0; e < entries.size(); ++e) put(find(of_entries[e], is_it), of_entries[e], e);
  }
};

}  // namespace

EXPORT void deal_ids(int64_t* message, int64_t stride, int64_t first, int64_t num_ranks, const int64_t* id_P,
                     const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                     const bool* trains, int64_t num_trains, int64_t capacity, bool distinct, int32_t* place_P,
                     int64_t* counts) {
  constexpr uint64_t SALT = 0x9e3779b97f4a7c15ULL;
  constexpr int64_t AHEAD = 16;
  static thread_local Scratch scratch;
  const int64_t count = count_ids(cell_P, num_positions);
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  scratch.begin(count);
  uint64_t* hashes = scratch.hashes.data();
  int32_t* vocabulary_P = scratch.vocabularies.data();
#pragma omp parallel for
  for (int64_t k = 0; k < count; ++k) {
    vocabulary_P[k] = cell_P[k] < 0 ? 0 : in.vocabulary(k);
    hashes[k] = hash_id(id_P[k], (uint64_t)(int64_t)vocabulary_P[k], SALT);
  }

  std::fill(counts, counts + 2 * num_ranks, 0);
  const auto tags = [=](int32_t rank) { return (int32_t*)(message + rank * stride + first + capacity); };
  const auto add = [&](int64_t id, int32_t vocabulary, uint64_t hash) {
    const int32_t rank = (uint32_t)(hash >> 33) % (uint32_t)num_ranks;
    int64_t place = counts[2 * rank]++;
    if (place < capacity) {
      message[rank * stride + first + place] = id;
      tags(rank)[place] = vocabulary << 1;
    } else {
      place = -1;
    }
    return Entry{id, vocabulary, rank, (int32_t)place};
  };
  for (int64_t k = 0; k < count; ++k) {
    if (const uint64_t mask = scratch.slots.size() - 1; k + 2 * AHEAD < count) {
      __builtin_prefetch(&scratch.slots[hashes[k + 2 * AHEAD] & mask]);
      __builtin_prefetch(scratch.entries.data() + (scratch.slots[hashes[k + AHEAD] & mask] & 0xffffffffULL));
    }
    place_P[k] = -1;
    if (cell_P[k] < 0) continue;
    const int64_t id = id_P[k];
    const int32_t vocabulary = vocabulary_P[k];
    const uint64_t hash = hashes[k];
    Entry entry;
    if (distinct) {
      const auto is_it = [&](uint64_t e) {
        return scratch.entries[e].id == id && scratch.entries[e].vocabulary == vocabulary;
      };
      const uint64_t at = scratch.find(hash, is_it), slot = scratch.slots[at];
      if (slot >> 48 == scratch.call)
        entry = scratch.entries[slot & 0xffffffffULL];
      else
        scratch.add(at, hash, entry = add(id, vocabulary, hash));
    } else {
      entry = add(id, vocabulary, hash);
    }
    ++counts[2 * entry.rank + 1];
    if (entry.place < 0) continue;
    place_P[k] = (int32_t)(entry.rank * capacity + entry.place);
    if (!trains || trains[cell_P[k] % num_trains]) tags(entry.rank)[entry.place] |= 1;
  }
  std::fill(place_P + count, place_P + num_positions, -1);
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    const int64_t used = std::min(counts[2 * rank], capacity);
    int64_t* bucket = message + rank * stride + first;
    std::fill(bucket + used, bucket + capacity, 0);
    std::fill(tags(rank) + used, tags(rank) + capacity, -1);
  }
}
