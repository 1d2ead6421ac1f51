// Takes back that a batch which does not count has touched rows.
#include "kernels/kernels.h"

EXPORT void untouch_rows(int64_t* seen, int64_t* counters, const int32_t* row_P, const int32_t* inverse_P,
                         int64_t num_positions, const int64_t* num_before, const bool* counts) {
  if (*counts) return;
  const int64_t last = (int64_t)((uint64_t)counters[STEP] << 32), without_number = last + ((int64_t)1 << 32) + NO_NUMBER;
  for (int64_t k = 0; k < num_positions; ++k)
    if (row_P[k] >= 0 && (inverse_P[k] >= *num_before || seen[row_P[k]] == without_number)) seen[row_P[k]] = last;
  counters[NUM_UNIQUE] = *num_before;
}
