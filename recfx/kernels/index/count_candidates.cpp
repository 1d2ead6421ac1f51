// Counts the ids that have no row: both indexes are read in parallel, then one thread counts in the ids' order.
#include <vector>

#include "kernels/index/find.h"
#include "kernels/kernels.h"

EXPORT void count_candidates(int64_t* candidate_slots, int64_t* candidate_ids, int32_t* candidate_vocabularies,
                             int32_t* candidate_counts, int64_t max_candidates, const int64_t* slots,
                             const int64_t* ids, int64_t* counters, const int64_t* id_P, const int32_t* cell_P,
                             int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                             int32_t* count_P) {
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const int64_t num_slots = counters[NUM_CANDIDATE_SLOTS];
  const uint64_t mask = (uint64_t)num_slots - 1, salt = (uint64_t)counters[SALT];
  const int64_t room = std::min(max_candidates, num_slots / 8 * 7), count = in.count;
  std::vector<int32_t> number(num_positions);
  find_all({slots, ids, (uint64_t)counters[NUM_SLOTS] - 1, salt}, in, count_P);
  find_all({candidate_slots, candidate_ids, mask, salt}, in, number.data());

  int64_t fill = counters[NUM_CANDIDATES];
  for (int64_t k = 0; k < count; ++k) {
    if (count_P[k] != UNKNOWN || cell_P[k] < 0) {
      count_P[k] = 0;
      continue;
    }
    int64_t n = number[k];
    if (n == UNKNOWN) {
      uint64_t at;
      const uint64_t vocabulary = in.vocabulary(k), hash = hash_id(in.id[k], vocabulary, salt);
      n = probe(candidate_slots, candidate_ids, mask, hash, vocabulary, in.id[k], &at);
      if (n == UNKNOWN && fill < room) {
        n = fill++;
        candidate_slots[at] = make_slot(slot_head(hash, vocabulary), n);
        candidate_ids[n] = in.id[k];
        candidate_vocabularies[n] = (int32_t)vocabulary;
        candidate_counts[n] = 0;
      }
    }
    count_P[k] = n == UNKNOWN ? 1 : ++candidate_counts[n];
  }
  std::fill(count_P + count, count_P + num_positions, 0);
  counters[NUM_CANDIDATES] = fill;
}
