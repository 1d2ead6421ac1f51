// One more step for each row that the step touched.
#include "kernels/kernels.h"

EXPORT void count_rows(int32_t* counts, const int64_t* counters, const int32_t* unique_rows, const bool* due) {
  constexpr int64_t AHEAD = 16;
  const int64_t num = *due ? counters[NUM_UNIQUE] : 0;
#pragma omp parallel for schedule(static)
  for (int64_t u = 0; u < num; ++u) {
    __builtin_prefetch(&counts[unique_rows[std::min(u + AHEAD, num - 1)]], 1);
    ++counts[unique_rows[u]];
  }
}
