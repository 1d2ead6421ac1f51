// The ids of all lookups, transposed into the table's order: sample, lookup, place in the list.
#include <omp.h>

#include "kernels/kernels.h"

// Whether lists [first, last) of a lookup, and those before them as a whole, are in its `capacity` values.
static bool are_inside(const int32_t* offsets, int64_t first, int64_t last, int64_t capacity) {
  int32_t falls = offsets[0] < 0 || offsets[first] < offsets[0] || offsets[last] > capacity;
  for (int64_t b = first; b < last; ++b) falls |= offsets[b + 1] < offsets[b];
  return !falls;
}

// False where offsets fall or leave the values: what is written is then of no use. Each thread looks at the offsets of
// its samples, which it is about to read: they are in no cache yet.
EXPORT bool order_ids(const int64_t* const* values, const int32_t* const* offsets, const int64_t* capacities,
                      int64_t num_lookups, int64_t batch_size, int64_t num_positions, int64_t* id_P, int32_t* cell_P) {
  int64_t total = 0;
  for (int64_t l = 0; l < num_lookups; ++l) total += offsets[l][batch_size] - offsets[l][0];
  if (total < 0 || total > num_positions) return false;
  std::fill(id_P + total, id_P + num_positions, 0);
  std::fill(cell_P + total, cell_P + num_positions, -1);
  bool right = true;
#pragma omp parallel reduction(&& : right)
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = batch_size * me / threads, last = batch_size * (me + 1) / threads;
    int64_t k = 0;
    for (int64_t l = 0; l < num_lookups; ++l) {
      right = right && are_inside(offsets[l], first, last, capacities[l]);
      k += offsets[l][first] - offsets[l][0];
    }
    for (int64_t b = first; right && b < last; ++b)
      for (int64_t l = 0; l < num_lookups; ++l)
        for (int32_t p = offsets[l][b]; p < offsets[l][b + 1]; ++p, ++k) {
          id_P[k] = values[l][p];
          cell_P[k] = (int32_t)(b * num_lookups + l);
        }
  }
  return right;
}
