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
  std::vector<uint64_t> slots, hashes;  // slot: call:16 | tag:16 | entry:32
  std::vector<Entry> entries;
  uint64_t call = 0;

  void begin(int64_t num_ids) {
    uint64_t size = 1024;
    while (size * 3 < (uint64_t)num_ids * 4) size *= 2;
    if (slots.size() < size || ++call == 1 << 16) {
      slots.assign(std::max<uint64_t>(size, slots.size()), 0);
      call = 1;
    }
    entries.clear();
    if (hashes.size() < (uint64_t)num_ids) hashes.resize(num_ids);
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
  const uint64_t mask = scratch.slots.size() - 1, stamp = scratch.call << 48;
  uint64_t* slots = scratch.slots.data();
  uint64_t* hashes = scratch.hashes.data();
#pragma omp parallel for
  for (int64_t k = 0; k < count; ++k)
    hashes[k] = cell_P[k] < 0 ? 0 : hash_id(id_P[k], (uint64_t)(int64_t)in.vocabulary(k), SALT);

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
    if (k + AHEAD < count) __builtin_prefetch(slots + (hashes[k + AHEAD] & mask));
    place_P[k] = -1;
    if (cell_P[k] < 0) continue;
    const int64_t id = id_P[k];
    const int32_t vocabulary = in.vocabulary(k);
    const uint64_t hash = hashes[k], head = stamp | (hash >> 48) << 32;
    Entry entry;
    if (distinct) {
      uint64_t start = hash, at, step = 0;
      for (;; ++step) {
        if (step == RUN) start = next_run(start), step = 0;
        at = (start + step) & mask;
        const uint64_t slot = slots[at];
        if (slot >> 48 != scratch.call) {
          slots[at] = head | scratch.entries.size();
          entry = add(id, vocabulary, hash);
          scratch.entries.push_back(entry);
          break;
        }
        if ((slot ^ head) >> 32) continue;
        entry = scratch.entries[slot & 0xffffffffULL];
        if (entry.id == id && entry.vocabulary == vocabulary) break;
      }
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
