// Rows of all ids, inserting the new ones, with de-duplication.
//
// 1. in parallel, each thread makes the ids of its share into keys, equal ones into one, and reads the index for them:
//    this is where the cache misses are.
// 2. during that, the first thread walks the keys in order: new rows, unique numbers, last-seen step. Keys that are not
//    yet found may then be found in slots that it fills, as they would be later.
// 3. in parallel, every id gets what its key got, and new rows get their initial values.
#include <atomic>
#include <memory>
#include <thread>

#include "kernels/index/find.h"
#include "kernels/kernels.h"

// The ids of each thread: equal work, where the first one also numbers all keys, at a fifth of the time of finding.
static int64_t first_of_share(int64_t count, int64_t thread, int64_t threads) {
  if (thread == 0 || thread == threads) return thread ? count : 0;
  const int64_t own = std::max<int64_t>(0, count * (6 - threads) / (5 * threads));
  return own + (count - own) * (thread - 1) / (threads - 1);
}

struct alignas(64) Progress {
  std::atomic<int64_t> found{0};
  std::atomic<bool> ended{false};
  int64_t num_padding = 0;
};

EXPORT void find_or_insert(int64_t* slots, int64_t* ids, int32_t* row_vocabularies, int64_t* seen, int32_t* born,
                           float* rows, const int32_t* free_rows, int32_t* unique_rows, int64_t* counters,
                           int64_t max_rows, int64_t max_unique, int64_t row_stride, int64_t row_blocks,
                           const int64_t* id_P, const int32_t* cell_P, int64_t num_positions,
                           const int32_t* vocabularies, int64_t num_lookups, const int64_t* init_keys,
                           const float* init_params, int64_t width, const bool* admit_P, int32_t* row_P,
                           int32_t* inverse_P) {
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const int64_t num_slots = counters[NUM_SLOTS], step = counters[STEP] + 1;
  const uint64_t mask = (uint64_t)num_slots - 1;
  const int64_t room = std::min(max_rows, num_slots / 8 * 7), first_new = counters[NUM_ROWS], count = in.count;
  const Index index{slots, ids, mask, (uint64_t)counters[SALT]};
  Keys keys(count);
  const std::unique_ptr<int32_t[]> numbers(new int32_t[count]);
  const std::unique_ptr<Progress[]> progress(new Progress[omp_get_max_threads()]);

  const int64_t first_free = counters[NUM_FREE];
  int64_t fill = first_new, free = first_free, unique = counters[NUM_UNIQUE], crowded = 0, unadmitted = 0;
  int64_t num_without = 0;
  const auto insert = [&](const Key& key) -> int32_t {
    uint64_t at;
    const int64_t id = id_P[key.position];
    int64_t row = probe(slots, ids, mask, key.hash, key.vocabulary, id, &at);
    if (row != UNKNOWN) return (int32_t)row;
    const bool admitted = admit_P == nullptr || admit_P[key.position];
    unadmitted += !admitted;
    if (!admitted || fill - free >= room) return REFUSED;
    row = free ? free_rows[--free] : fill++;
    ids[row] = id;
    store_slot(slots + at, make_slot(slot_head(key.hash, key.vocabulary), row));
    crowded += is_crowded(at, key.hash, mask);
    row_vocabularies[row] = key.vocabulary;
    seen[row] = -1;
    born[row] = (int32_t)step;
    return (int32_t)row;
  };

  constexpr int64_t AHEAD = 32;  // `seen` is fetched by the thread that writes it: another's core would keep the line
  const auto number_keys = [&](int64_t begin, int64_t end) {
    // By local pointers: what is captured would be read again after every store.
    int32_t *const row = keys.row.get(), *const number = numbers.get(), *const rows_in_order = unique_rows;
    int64_t* const last_seen = seen;
    const uint64_t now = (uint64_t)step << 32;
    int64_t next = unique;
    for (int64_t j = begin; j < end; ++j) {
      if (j + AHEAD < end) __builtin_prefetch(&last_seen[std::max(row[j + AHEAD], 0)], 1);
      if (row[j] == UNKNOWN) row[j] = insert(keys.key[j]);
      number[j] = UNKNOWN;
      if (row[j] == REFUSED) {
        ++num_without;
        continue;
      }
      // Without a branch on "first time in this step", which no predictor guesses: the number is written in any case.
      const int64_t before = last_seen[row[j]];
      const bool first = (uint64_t)before - now >= (uint64_t)NO_NUMBER;  // of another step, or of this one and without a number
      if (first && next >= max_unique) {
        ++num_without;
        continue;
      }
      const int64_t n = first ? next : (before & 0xffffffffLL);
      last_seen[row[j]] = (int64_t)(now | (uint64_t)n);
      rows_in_order[n] = row[j];
      number[j] = (int32_t)n;
      next += first;
    }
    unique = next;
  };
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const auto share = [&](int64_t thread) { return first_of_share(count, thread, threads); };
    Finder finder(index, in, admit_P, keys);
    finder.find(share(me), share(me + 1), inverse_P, [&](int64_t place) {
      progress[me].found.store(place, std::memory_order_release);
    });
    progress[me].num_padding = finder.num_padding;
    progress[me].ended.store(true, std::memory_order_release);
    for (int64_t t = 0; me == 0 && t < threads; ++t)
      for (int64_t j = share(t), ended = false; !ended;) {
        ended = progress[t].ended.load(std::memory_order_acquire);
        const int64_t found = std::max(progress[t].found.load(std::memory_order_acquire), share(t));
        if (found < j + 256 && !ended) {
          std::this_thread::yield();
        } else {
          number_keys(j, found);
          j = found;
        }
      }
#pragma omp barrier
    const int32_t *const row = keys.row.get(), *const number = numbers.get();
    for (int64_t k = share(me); k < share(me + 1); ++k) {
      const int32_t place = inverse_P[k];
      if (place < 0) {  // padding
        row_P[k] = UNKNOWN;
        continue;
      }
      row_P[k] = row[place];
      inverse_P[k] = number[place];
    }
  }
  counters[NUM_ROWS] = fill;
  counters[NUM_UNIQUE] = unique;
  counters[NUM_CROWDED] += crowded;
  int64_t num_padding = 0;
  for (int64_t t = 0; t < omp_get_max_threads(); ++t) num_padding += progress[t].num_padding;
  if (num_without)
    counters[NUM_REFUSED] += std::count(inverse_P, inverse_P + count, UNKNOWN) - unadmitted - num_padding;
  std::fill(row_P + count, row_P + num_positions, UNKNOWN);
  std::fill(inverse_P + count, inverse_P + num_positions, UNKNOWN);
  counters[NUM_FREE] = free;
  const int64_t reused = first_free - free, created = reused + fill - first_new;
  counters[LOOKED_UP] += count - num_padding;
  counters[CREATED] += created;
  counters[UNADMITTED] += unadmitted;

  const Initializer init{init_keys, init_params, width};
#pragma omp parallel for schedule(static) if (created > 0)
  for (int64_t n = 0; n < created; ++n) {
    const int64_t row = n < reused ? free_rows[free + n] : first_new + n - reused;
    float* block = rows + row * row_stride;
    initial_values(init, row_vocabularies[row], ids[row], 0, width, block);
    std::fill(block + width, block + row_blocks * width, 0.0f);
  }
}
