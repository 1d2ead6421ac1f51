// Sum-pools rows into one block [B, L, dim] per slice of the row's columns.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels/kernels.h"

// Rare, so kept out of the loop that it would slow.
static __attribute__((noinline)) void add_initial_values(const Initializer& init, uint64_t vocabulary, int64_t id,
                                                         int64_t first, int64_t dim, float weight, float* to) {
  float values[dim];
  initial_values(init, vocabulary, id, first, dim, values);
  for (int64_t c = 0; c < dim; ++c) to[c] += weight * values[c];
}

constexpr int64_t LONG = 1 << 16;  // ids of a sample, from which sums are f64: in f32, 2^24 ones and one more are 2^24

// One slice of a sample with so many ids, summed in f64. Rare, so kept out of the loop that it would slow.
static __attribute__((noinline)) void pool_long(const float* rows, int64_t stride, const int32_t* row_P, const Ids& in,
                                                const Initializer& unknown, bool has_unknown, int64_t begin,
                                                int64_t end, int64_t sample, int64_t first, int64_t dim,
                                                const float* weight_P, float* block) {
  std::vector<double> total(in.num_lookups * dim);
  std::vector<float> values(dim);
  for (int64_t k = begin; k < end; ++k) {
    if (in.cell[k] < 0 || (row_P[k] < 0 && !has_unknown)) continue;
    const float* from = rows + std::max(row_P[k], 0) * stride + first;
    if (row_P[k] < 0) {
      initial_values(unknown, in.vocabulary(k), in.id[k], first, dim, values.data());
      from = values.data();
    }
    double* to = total.data() + (in.cell[k] - sample * in.num_lookups) * dim;
    for (int64_t c = 0; c < dim; ++c) to[c] += weight_P ? weight_P[k] * from[c] : from[c];
  }
  std::copy(total.begin(), total.end(), block + sample * in.num_lookups * dim);
}

EXPORT void pool(const float* rows, int64_t stride, int64_t width, const int32_t* row_P, const int64_t* id_P,
                 const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                 int64_t batch_size, const int64_t* init_keys, const float* unknown_params, int64_t num_slices,
                 const int64_t* firsts, const int64_t* dims, const float* weight_P, float* const* out) {
  constexpr int64_t AHEAD = 48;  // ids beyond the sample whose rows are being fetched
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  const Initializer unknown{init_keys, unknown_params, width};
  const auto is_id = [](int32_t cell) { return cell >= 0; };
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
      if (end - begin >= LONG && std::count_if(cell_P + begin, cell_P + end, is_id) >= LONG) {
        for (int64_t s = 0; s < num_slices; ++s)
          pool_long(rows, stride, row_P, in, unknown, unknown_params, begin, end, sample, firsts[s], dims[s], weight_P,
                    out[s]);
        continue;
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
