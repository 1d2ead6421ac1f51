// Sum-pools rows into one block [B, L, dim] per slice of the row's columns.
#include "table.h"

EXPORT void pool(const float* rows, int64_t row_blocks, int64_t width, const int32_t* row_P, const int64_t* id_P,
                 const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                 int64_t batch_size, const int64_t* init_keys, const float* init_params, int64_t num_slices,
                 const int64_t* firsts, const int64_t* dims, float* const* out) {
  constexpr int64_t SAMPLES = 16, AHEAD = 32;
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const Initializer init{init_keys, init_params, width};
  const int64_t stride = row_blocks * width, count = in.count();
#pragma omp parallel for schedule(static)
  for (int64_t sample = 0; sample < batch_size; sample += SAMPLES) {
    const int64_t last_sample = std::min(sample + SAMPLES, batch_size);
    for (int64_t s = 0; s < num_slices; ++s)
      std::fill(out[s] + sample * num_lookups * dims[s], out[s] + last_sample * num_lookups * dims[s], 0.0f);
    const int64_t end = in.first_of(last_sample);
    for (int64_t k = in.first_of(sample); k < end; ++k) {
      if (k + AHEAD < count && row_P[k + AHEAD] >= 0)
        for (int64_t c = 0; c < width + 15; c += 16)
          __builtin_prefetch(rows + row_P[k + AHEAD] * stride + std::min(c, width - 1));
      if (row_P[k] == UNKNOWN) continue;
      for (int64_t s = 0; s < num_slices; ++s) {
        float* to = out[s] + cell_P[k] * dims[s];
        if (row_P[k] == REFUSED) {
          float initial[dims[s]];
          initial_values(init, in.vocabulary(k), id_P[k], firsts[s], dims[s], initial);
          add_floats(to, initial, dims[s]);
        } else {
          add_floats(to, rows + row_P[k] * stride + firsts[s], dims[s]);
        }
      }
    }
  }
}
