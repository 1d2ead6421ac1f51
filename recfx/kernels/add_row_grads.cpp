// Adds each id's gradient to its unique row's, occurrences in order: the sums do not depend on the threads.
#include <omp.h>

#include <vector>

#include "table.h"

EXPORT void add_row_grads(float* grads_UW, int64_t stride, const int32_t* inverse_P, const int32_t* cell_P,
                          int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups, int64_t num_slices,
                          const int64_t* firsts, const int64_t* dims, const float* const* blocks) {
  constexpr int64_t CHUNK = 256;
  const Ids in{nullptr, cell_P, num_positions, vocabularies, num_lookups};
  const int64_t count = in.count();
  const int64_t num_vocabularies = *std::max_element(vocabularies, vocabularies + num_lookups) + 1;
#pragma omp parallel
  {
    // A unique row belongs to one vocabulary: whole vocabularies go to threads where there are enough of them, otherwise
    // every thread walks all ids and takes its share of the unique numbers.
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const bool by_vocabulary = num_vocabularies >= 2 * threads;
    std::vector<char> mine(num_lookups);
    for (int64_t l = 0; l < num_lookups; ++l)
      mine[l] = !by_vocabulary || vocabularies[l] * threads / num_vocabularies == me;
    int64_t position[CHUNK], num_mine;
    for (int64_t begin = 0, sample = 0; begin < count; begin += CHUNK) {
      num_mine = 0;
      for (int64_t k = begin; k < std::min(begin + CHUNK, count); ++k) {
        while (cell_P[k] >= sample + num_lookups) sample += num_lookups;
        if (!mine[cell_P[k] - sample] || inverse_P[k] < 0 || (!by_vocabulary && inverse_P[k] % threads != me)) continue;
        position[num_mine++] = k;
        __builtin_prefetch(grads_UW + inverse_P[k] * stride, 1);
        for (int64_t s = 0; s < num_slices; ++s) __builtin_prefetch(blocks[s] + cell_P[k] * dims[s]);
      }
      for (int64_t s = 0; s < num_slices; ++s)
        with_dim(dims[s], [&](auto dim) {
          for (int64_t i = 0; i < num_mine; ++i) {
            float* __restrict to = grads_UW + inverse_P[position[i]] * stride + firsts[s];
            const float* __restrict from = blocks[s] + cell_P[position[i]] * dim;
            for (int64_t c = 0; c < dim; ++c) to[c] += from[c];
          }
        });
    }
  }
}
