// Sum-pools rows into one block [B, L, dim] per slice of the row's columns.
#include <algorithm>

#include "table.h"

EXPORT void pool(const float* rows, int64_t row_blocks, int64_t width, const int32_t* row_P, const int64_t* values,
                 const int32_t* offsets, const int64_t* starts, const int32_t* vocabularies, int64_t num_lookups,
                 int64_t batch_size, const int64_t* init_keys, const float* init_params, int64_t num_slices,
                 const int64_t* firsts, const int64_t* dims, float* const* out) {
  const Lookups in{values, offsets, starts, vocabularies, num_lookups, batch_size};
  const Initializer init{init_keys, init_params, width};
  const int64_t stride = row_blocks * width;
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < batch_size; ++b) {
    if (b + 2 < batch_size)
      for (int64_t l = 0; l < num_lookups; ++l) {
        const int32_t* offset = in.of(l);
        if (offset[b + 2] < offset[b + 3] && row_P[starts[l] + offset[b + 2]] >= 0)
          __builtin_prefetch(rows + row_P[starts[l] + offset[b + 2]] * stride);
      }
    for (int64_t l = 0; l < num_lookups; ++l) {
      const int32_t* offset = in.of(l);
      const int64_t begin = starts[l] + offset[b], end = starts[l] + offset[b + 1];
      for (int64_t s = 0; s < num_slices; ++s) {
        const int64_t first = firsts[s], dim = dims[s];
        float* to = out[s] + (b * num_lookups + l) * dim;
        if (end == begin + 1 && row_P[begin] >= 0) {
          copy_floats(to, rows + row_P[begin] * stride + first, dim);
          continue;
        }
        for (int64_t c = 0; c < dim; ++c) to[c] = 0.0f;
        for (int64_t p = begin; p < end; ++p) {
          float initial[dim];
          const float* from = rows + row_P[p] * stride + first;
          if (row_P[p] == UNKNOWN) continue;
          if (row_P[p] == REFUSED) {
            initial_values(init, vocabularies[l], values[p], first, dim, initial);
            from = initial;
          }
          add_floats(to, from, dim);
        }
      }
    }
  }
}
