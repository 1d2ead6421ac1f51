// Sum-pools rows into one block [B, L, dim] per slice of the row's columns.
#include <omp.h>

#include "table.h"

// Rare, so kept out of the loop that it would slow.
static __attribute__((noinline)) void add_initial_values(const Initializer& init, uint64_t vocabulary, int64_t id,
                                                         int64_t first, int64_t dim, float weight, float* to) {
  float values[dim];
  initial_values(init, vocabulary, id, first, dim, values);
  for (int64_t c = 0; c < dim; ++c) to[c] += weight * values[c];
}

EXPORT void pool(const float* rows, int64_t stride, int64_t width, const int32_t* row_P, const int64_t* id_P,
                 const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                 int64_t batch_size, const int64_t* init_keys, const float* unknown_params, int64_t num_slices,
                 const int64_t* firsts, const int64_t* dims, const float* weight_P, float* const* out) {
  constexpr int64_t AHEAD = 48;  // ids beyond the sample whose rows are being fetched
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const Initializer unknown{init_keys, unknown_params, width};
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t last = batch_size * (me + 1) / threads, limit = in.first_of(last);
    int64_t sample = batch_size * me / threads, begin = in.first_of(sample), end = begin, fetched = begin;
    for (; sample < last; ++sample, begin = end) {
      while (end < limit && cell_P[end] < (sample + 1) * num_lookups) ++end;
      for (const int64_t ahead = std::min(end + AHEAD, limit); fetched < ahead; ++fetched) {
        const float* row = rows + std::max(row_P[fetched], 0) * stride;
        for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(row + c);
      }
      for (int64_t s = 0; s < num_slices; ++s)
        with_dim(dims[s], [&](auto dim) {
          float* block = out[s];
          std::fill(block + sample * num_lookups * dim, block + (sample + 1) * num_lookups * dim, 0.0f);
          for (int64_t k = begin; k < end; ++k) {
            float* __restrict to = block + cell_P[k] * dim;
            const float weight = weight_P ? weight_P[k] : 1.0f;
            if ((row_P[k] | cell_P[k]) >= 0) {
              const float* __restrict from = rows + row_P[k] * stride + firsts[s];
              for (int64_t c = 0; c < dim; ++c) to[c] += weight * from[c];
            } else if (unknown_params && cell_P[k] >= 0) {
              add_initial_values(unknown, in.vocabulary(k), id_P[k], firsts[s], dim, weight, to);
            }
          }
        });
    }
  }
}
