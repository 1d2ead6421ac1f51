// The ids of all lookups, transposed into the table's order: sample, lookup, place in the list.
#include <omp.h>

#include "table.h"

EXPORT void order_ids(const int64_t* const* values, const int32_t* const* offsets, int64_t num_lookups,
                      int64_t batch_size, int64_t num_positions, int64_t* id_P, int32_t* cell_P) {
  int64_t total = 0;
  for (int64_t l = 0; l < num_lookups; ++l) total += offsets[l][batch_size] - offsets[l][0];
  std::fill(id_P + total, id_P + num_positions, 0);
  std::fill(cell_P + total, cell_P + num_positions, -1);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = batch_size * me / threads, last = batch_size * (me + 1) / threads;
    int64_t k = 0;
    for (int64_t l = 0; l < num_lookups; ++l) k += offsets[l][first] - offsets[l][0];
    for (int64_t b = first; b < last; ++b)
      for (int64_t l = 0; l < num_lookups; ++l)
        for (int32_t p = offsets[l][b]; p < offsets[l][b + 1]; ++p, ++k) {
          id_P[k] = values[l][p];
          cell_P[k] = (int32_t)(b * num_lookups + l);
        }
  }
}
