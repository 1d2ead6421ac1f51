// Which rows are among the step's after all: those with an occurrence that trains, numbered again in their order.
#include <vector>

#include "kernels/kernels.h"

EXPORT void keep_trained(int64_t* seen, int32_t* unique_rows, int64_t* counters, int64_t num_before,
                         const int32_t* inverse_P, const int32_t* cell_P, int64_t num_positions, const bool* trains,
                         int64_t num_cells, int32_t* out_P) {
  if (num_positions == 0) return;
  const int64_t num_new = counters[NUM_UNIQUE] - num_before;
  std::vector<int32_t> number(num_new, UNKNOWN);  // of each new one: whether it is kept, then its number
  const auto is_trained = [&](int64_t k) {
    return cell_P[k] >= 0 && inverse_P[k] >= 0 && trains[cell_P[k] % num_cells];
  };
  for (int64_t k = 0; k < num_positions; ++k)
    if (is_trained(k) && inverse_P[k] >= num_before) number[inverse_P[k] - num_before] = 0;
  const uint64_t now = (uint64_t)(counters[STEP] + 1) << 32;
  int64_t next = num_before;
  for (int64_t n = 0; n < num_new; ++n) {
    const int32_t row = unique_rows[num_before + n];
    const bool kept = number[n] == 0;
    seen[row] = (int64_t)(now | (kept ? (uint64_t)next : (uint64_t)NO_NUMBER));
    if (!kept) continue;
    number[n] = (int32_t)next;
    unique_rows[next++] = row;
  }
  counters[NUM_UNIQUE] = next;
  for (int64_t k = 0; k < num_positions; ++k) {
    const int32_t before = inverse_P[k];
    out_P[k] = !is_trained(k) ? UNKNOWN : before >= num_before ? number[before - num_before] : before;
  }
}
