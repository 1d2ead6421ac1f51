// Sum-pools rows into one block [B, L, dim] per slice of the row's columns.
#include "table.h"

// Rare, so kept out of the loop that it would slow.
static __attribute__((noinline)) void add_initial_values(const Initializer& init, uint64_t vocabulary, int64_t id,
                                                         int64_t first, int64_t dim, float* to) {
  float values[dim];
  initial_values(init, vocabulary, id, first, dim, values);
  for (int64_t c = 0; c < dim; ++c) to[c] += values[c];
}

EXPORT void pool(const float* rows, int64_t stride, int64_t width, const int32_t* row_P, const int64_t* id_P,
                 const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                 int64_t batch_size, const int64_t* init_keys, const float* init_params, int64_t num_slices,
                 const int64_t* firsts, const int64_t* dims, float* const* out) {
  constexpr int64_t SAMPLES = 16;  // few enough that their rows stay in the first cache from slice to slice
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const Initializer init{init_keys, init_params, width};
#pragma omp parallel for schedule(static)
  for (int64_t sample = 0; sample < batch_size; sample += SAMPLES) {
    const int64_t last_sample = std::min(sample + SAMPLES, batch_size);
    const int64_t begin = in.first_of(sample), end = in.first_of(last_sample);
    for (int64_t k = begin; k < end; ++k)
      if (row_P[k] >= 0) {
        __builtin_prefetch(rows + row_P[k] * stride);
        for (int64_t c = 15; c < width; c += 16) __builtin_prefetch(rows + row_P[k] * stride + c);
      }
    for (int64_t s = 0; s < num_slices; ++s)
      with_dim(dims[s], [&](auto dim) {
        float* block = out[s];
        std::fill(block + sample * num_lookups * dim, block + last_sample * num_lookups * dim, 0.0f);
        for (int64_t k = begin; k < end; ++k) {
          float* __restrict to = block + cell_P[k] * dim;
          if (row_P[k] >= 0) {
            const float* __restrict from = rows + row_P[k] * stride + firsts[s];
            for (int64_t c = 0; c < dim; ++c) to[c] += from[c];
          } else if (row_P[k] == REFUSED) {
            add_initial_values(init, in.vocabulary(k), id_P[k], firsts[s], dim, to);
          }
        }
      });
  }
}
