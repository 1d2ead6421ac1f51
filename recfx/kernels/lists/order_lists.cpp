// As order_ids, for lists that are tiled or weighted; and the sum of each list's weights.
#include <omp.h>

#include "kernels/kernels.h"

EXPORT void order_lists(const int64_t* const* values, const int32_t* const* offsets, const float* const* weights,
                        const int64_t* lengths, int64_t num_lookups, int64_t batch_size, int64_t num_positions,
                        int64_t* id_P, int32_t* cell_P, float* weight_P) {
  // Ids of list b that are kept, and of all lists before it.
  const auto kept = [=](int64_t l, int64_t b) -> int64_t {
    const int64_t n = offsets[l][b + 1] - offsets[l][b];
    return lengths[l] ? std::min(n, lengths[l]) : n;
  };
  const auto kept_before = [=](int64_t l, int64_t end) -> int64_t {
    if (!lengths[l]) return offsets[l][end] - offsets[l][0];
    int64_t sum = 0;
    for (int64_t b = 0; b < end; ++b) sum += kept(l, b);
    return sum;
  };
  int64_t total = 0, num_cells = 0;
  for (int64_t l = 0; l < num_lookups; ++l) {
    total += kept_before(l, batch_size);
    num_cells += std::max<int64_t>(lengths[l], 1);
  }
  std::fill(id_P + total, id_P + num_positions, 0);
  std::fill(cell_P + total, cell_P + num_positions, -1);
  std::fill(weight_P + total, weight_P + num_positions, 0.0f);
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = batch_size * me / threads, last = batch_size * (me + 1) / threads;
    int64_t k = 0;
    for (int64_t l = 0; l < num_lookups; ++l) k += kept_before(l, first);
    for (int64_t b = first; b < last; ++b)
      for (int64_t l = 0, cell = b * num_cells; l < num_lookups; cell += std::max<int64_t>(lengths[l++], 1))
        for (int64_t i = 0, p = offsets[l][b], n = kept(l, b); i < n; ++i, ++p, ++k) {
          id_P[k] = values[l][p];
          cell_P[k] = (int32_t)(cell + (lengths[l] ? i : 0));
          weight_P[k] = weights[l] ? weights[l][p] : 1.0f;
        }
  }
}

EXPORT void list_sums(const float* values, const int32_t* offsets, int64_t num_lists, float* out) {
#pragma omp parallel for schedule(static)
  for (int64_t l = 0; l < num_lists; ++l) {
    double sum = 0;
    for (int32_t p = offsets[l]; p < offsets[l + 1]; ++p) sum += values[p];
    out[l] = sum;
  }
}
