// Takes back that a batch which does not count has touched rows.
#include "table.h"

EXPORT void untouch_rows(int64_t* seen, const int32_t* row_P, const int32_t* inverse_P, int64_t num_positions,
                         const int64_t* num_before, const int64_t* step, const bool* counts) {
  if (*counts) return;
  for (int64_t k = 0; k < num_positions; ++k)
    if (inverse_P[k] >= *num_before) seen[row_P[k]] = (int64_t)((uint64_t)*step << 32);
}
