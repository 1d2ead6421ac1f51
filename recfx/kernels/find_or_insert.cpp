// Rows of all ids, inserting the new ones, with de-duplication.
//
// 1. in parallel, the index is read: this is where the cache misses are.
// 2. behind that, the first thread walks the ids in order: new rows, unique numbers, last-seen step. Ids that are not
//    yet found may then be found in slots that it fills, as they would be later.
// 3. in parallel, new rows get their initial values.
#include <atomic>
#include <thread>
#include <vector>

#include "find.h"

// The ids of each thread: equal work, where the first one also numbers all ids, at about half the time of finding one.
static int64_t first_of_share(int64_t count, int64_t thread, int64_t threads) {
  if (thread == 0 || thread == threads) return thread ? count : 0;
  const int64_t own = std::max<int64_t>(0, count * (3 - threads) / (2 * threads));
  return own + (count - own) * (thread - 1) / (threads - 1);
}

struct alignas(64) Progress {
  std::atomic<int64_t> found{0};
};

enum { LOOKED_UP, CREATED, EVICTED, UNADMITTED };

EXPORT void find_or_insert(int64_t* slots, int64_t* ids, int32_t* row_vocabularies, int64_t* seen, int32_t* born,
                           float* rows, int64_t* num_rows, const int32_t* free_rows, int64_t* num_free,
                           int64_t* num_refused, int64_t* tally, int64_t* num_crowded, int32_t* unique_rows,
                           int64_t* num_unique, const int64_t* num_slots, const int64_t* salt, const int64_t* step,
                           int64_t max_rows, int64_t max_unique, int64_t row_stride, int64_t row_blocks,
                           const int64_t* id_P, const int32_t* cell_P, int64_t num_positions,
                           const int32_t* vocabularies, int64_t num_lookups, const int64_t* init_keys,
                           const float* init_params, int64_t width, const bool* admit_P, int32_t* row_P,
                           int32_t* inverse_P) {
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const uint64_t mask = (uint64_t)*num_slots - 1, now = (uint64_t)*step << 32;
  const int64_t room = std::min(max_rows, *num_slots / 8 * 7), first_new = *num_rows, count = in.count();
  const Index index{slots, ids, mask, (uint64_t)*salt};
  std::vector<Progress> progress(omp_get_max_threads());

  constexpr int64_t AHEAD = 48;  // `seen` is fetched by the thread that writes it: another one's core would keep the line
  const int64_t first_free = *num_free;
  int64_t fill = first_new, free = first_free, unique = *num_unique, refused = 0, unadmitted = 0;
  const auto number = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (k + AHEAD < end) __builtin_prefetch(&seen[std::max(row_P[k + AHEAD], 0)], 1);
      int64_t row = row_P[k];
      if (row == UNKNOWN) {
        uint64_t at;
        const uint64_t vocabulary = in.vocabulary(k), hash = hash_id(id_P[k], vocabulary, (uint64_t)*salt);
        row = probe(slots, ids, mask, hash, vocabulary, id_P[k], &at);
        const bool admitted = row != UNKNOWN || admit_P == nullptr || admit_P[k];
        if (!admitted || (row == UNKNOWN && fill - free >= room)) {
          row_P[k] = REFUSED;
          inverse_P[k] = UNKNOWN;
          ++(admitted ? refused : unadmitted);
          continue;
        }
        if (row == UNKNOWN) {
          row = free ? free_rows[--free] : fill++;
          ids[row] = id_P[k];
          store_slot(slots + at, make_slot(slot_head(hash, vocabulary), row));
          *num_crowded += is_crowded(at, hash, mask);
          row_vocabularies[row] = (int32_t)vocabulary;
          seen[row] = -1;
          born[row] = (int32_t)*step;
        }
        row_P[k] = (int32_t)row;
      }
      // Without a branch on "first time in this step", which no predictor guesses: the number is written in any case.
      const int64_t before = seen[row];
      const bool first = ((uint64_t)before ^ now) >> 32 != 0;
      if (first && unique >= max_unique) {
        inverse_P[k] = UNKNOWN;
        ++refused;
        continue;
      }
      const int64_t number = first ? unique : (before & 0xffffffffLL);
      seen[row] = (int64_t)(now | (uint64_t)number);
      unique_rows[number] = (int32_t)row;
      inverse_P[k] = (int32_t)number;
      unique += first;
    }
  };
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const auto share = [&](int64_t thread) { return first_of_share(count, thread, threads); };
    find_range(index, in, share(me), share(me + 1), row_P,
               [&](int64_t k) { progress[me].found.store(k, std::memory_order_release); });
    for (int64_t t = 0, k = 0; me == 0 && t < threads; ++t)
      while (k < share(t + 1)) {
        const int64_t found = progress[t].found.load(std::memory_order_acquire);
        if (found < std::min(k + 256, share(t + 1))) {
          std::this_thread::yield();
        } else {
          number(k, found);
          k = found;
        }
      }
  }
  std::fill(row_P + count, row_P + num_positions, UNKNOWN);
  std::fill(inverse_P + count, inverse_P + num_positions, UNKNOWN);
  *num_rows = fill;
  *num_unique = unique;
  *num_refused += refused;
  *num_free = free;
  const int64_t reused = first_free - free, created = reused + fill - first_new;
  tally[LOOKED_UP] += count;
  tally[CREATED] += created;
  tally[UNADMITTED] += unadmitted;

  const Initializer init{init_keys, init_params, width};
#pragma omp parallel for schedule(static) if (created > 0)
  for (int64_t n = 0; n < created; ++n) {
    const int64_t row = n < reused ? free_rows[free + n] : first_new + n - reused;
    float* block = rows + row * row_stride;
    initial_values(init, row_vocabularies[row], ids[row], 0, width, block);
    std::fill(block + width, block + row_blocks * width, 0.0f);
  }
}
