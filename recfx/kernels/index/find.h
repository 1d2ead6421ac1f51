// Reading the index: each thread takes a share of the ids and looks up those that are equal once.
#pragma once
#include <omp.h>

#include <memory>

#include "kernels/index/table.h"

struct Index {
  const int64_t* slots;
  const int64_t* ids;
  uint64_t mask, salt;
};

// An id as it is looked up.
struct Key {
  uint64_t hash;  // within a vocabulary no two ids have the same
  int32_t vocabulary, position;
};

// The keys of all shares and their rows: a share of the ids [begin, end) fills the places from `begin` on.
struct Keys {
  std::unique_ptr<Key[]> key;
  std::unique_ptr<int32_t[]> row;
  explicit Keys(int64_t num_ids) : key(new Key[num_ids]), row(new int32_t[num_ids]) {}
};

// One thread's way through its share. Ids go through it in chunks: made keys, then their slots seen, then their rows
// known; each stage fetches for the next, so that cache misses overlap.
class Finder {
 public:
  Finder(const Index& index, const Ids& in, const bool* shared_P, Keys& keys)
      : index(index), in(in), shared_P(shared_P), key(keys.key.get()), row(keys.row.get()) {}

  int64_t num_padding = 0;  // among the ids of the share: places are -1 there

  // place_P[k] of the ids [begin, end): where `keys` has the key and the row of id k. Whenever more is known,
  // `found(place)` is called when all rows of the share before `place` are.
  template <class F>
  void find(int64_t begin, int64_t end, int32_t* place_P, F found) {
    for (met_bits = 4; met_bits < MET_BITS && (1 << met_bits) < end - begin;) ++met_bits;
    std::fill(met, met + (1 << met_bits), Met{0, -1, 0});
    int64_t known = begin, seen = begin, made = begin;
    for (int64_t k = begin; known < made || k < end; k += CHUNK) {
      const int64_t now_made = k < end ? make_keys(k, std::min(CHUNK, end - k), made, place_P) : made;
      for (int64_t j = made; j < now_made; ++j) __builtin_prefetch(&index.slots[key[j].hash & index.mask]);
      for (int64_t j = known; j < seen; ++j) row[j] = find_row(key[j]);
      for (int64_t j = seen; j < made; ++j) {
        const int64_t slot = load_slot(index.slots + (key[j].hash & index.mask));
        __builtin_prefetch(&index.ids[slot == EMPTY ? 0 : slot_row(slot)]);
      }
      known = seen, seen = made, made = now_made;
      found(known);
    }
  }

 private:
  static constexpr int64_t CHUNK = 64, MET_BITS = 13;

  // The last id of each hash. An id that it forgets later gets a second key, which is harmless.
  struct Met {
    uint64_t hash;
    int32_t mark, place;  // mark: the vocabulary; -1: not to be shared
  };

  const Index& index;
  const Ids& in;
  const bool* shared_P;  // whether id k may share its key with equal ids; null: all may
  Key* key;
  int32_t* row;
  int met_bits;
  Met met[1 << MET_BITS];  // of which 2^met_bits are in use: no more than there are ids

  int32_t find_row(const Key& k) const {
    uint64_t at;
    return (int32_t)probe(index.slots, index.ids, index.mask, k.hash, k.vocabulary, in.id[k.position], &at);
  }

  // Without a branch on "met before", which no predictor guesses: the next key is written in any case.
  int64_t make_keys(int64_t first, int64_t n, int64_t place, int32_t* place_P) {
    int32_t in_any = 0;
    for (int64_t i = 0; i < n; ++i) in_any |= in.cell[first + i];
    if (in_any < 0) return make_keys_between_padding(first, n, place, place_P);
    uint64_t hash[CHUNK];
    int32_t vocabulary[CHUNK], shared[CHUNK];
    for (int64_t i = 0; i < n; ++i) vocabulary[i] = in.vocabulary(first + i);
    for (int64_t i = 0; i < n; ++i) hash[i] = hash_id(in.id[first + i], vocabulary[i], index.salt);
    for (int64_t i = 0; shared_P != nullptr && i < n; ++i) shared[i] = shared_P[first + i] ? vocabulary[i] : -1;
    const int32_t* const mark = shared_P ? shared : vocabulary;
    Key* const out = key;
    const int unused = 64 - met_bits;
    for (int64_t i = 0; i < n; ++i) {
      Met& last = met[hash[i] >> unused];
      const int32_t is_new = (last.hash != hash[i]) | (last.mark != mark[i]) | (mark[i] < 0);
      const int32_t at = ((int32_t)place & -is_new) | (last.place & (is_new - 1));
      last = {hash[i], mark[i], at};
      out[place] = {hash[i], vocabulary[i], (int32_t)(first + i)};
      place_P[first + i] = at;
      place += is_new;
    }
    return place;
  }

  // Rare: ids that other processes have sent.
  __attribute__((noinline)) int64_t make_keys_between_padding(int64_t first, int64_t n, int64_t place,
                                                              int32_t* place_P) {
    for (int64_t k = first; k < first + n; ++k) {
      place_P[k] = -1;
      if (in.cell[k] < 0) {
        ++num_padding;
        continue;
      }
      const int32_t vocabulary = in.vocabulary(k);
      key[place] = {hash_id(in.id[k], vocabulary, index.salt), vocabulary, (int32_t)k};
      place_P[k] = (int32_t)place++;
    }
    return place;
  }
};

// out[k] for every id k; padding gets UNKNOWN.
static inline void find_all(const Index& index, const Ids& in, int32_t* out) {
  const int64_t count = in.count;
  Keys keys(count);
  std::fill(out + count, out + in.num_positions, UNKNOWN);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = count * me / threads, end = count * (me + 1) / threads;
    Finder finder(index, in, nullptr, keys);
    finder.find(begin, end, out, [](int64_t) {});
    if (finder.num_padding == 0) {
      for (int64_t k = begin; k < end; ++k) out[k] = keys.row[out[k]];
    } else {
      for (int64_t k = begin; k < end; ++k) out[k] = out[k] < 0 ? UNKNOWN : keys.row[out[k]];
    }
  }
}
