// Adds each position's gradient to its unique row's, occurrences in order: the sums do not depend on the threads.
#include <omp.h>

#include <vector>

#include "table.h"

EXPORT void add_row_grads(float* grads_UW, int64_t width, const int32_t* inverse_P, const int32_t* offsets,
                          const int64_t* starts, const int32_t* vocabularies, int64_t num_lookups, int64_t batch_size,
                          int64_t num_slices, const int64_t* firsts, const int64_t* dims, const float* const* blocks) {
  const Lookups in{nullptr, offsets, starts, vocabularies, num_lookups, batch_size};
  int64_t total = 0, num_vocabularies = 0;
  for (int64_t l = 0; l < num_lookups; ++l) {
    total += in.count(l);
    num_vocabularies = std::max<int64_t>(num_vocabularies, vocabularies[l] + 1);
  }
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    // A unique row belongs to one vocabulary: whole vocabularies go to threads where there are enough of them, otherwise
    // every thread walks all positions and takes its share of the unique numbers.
    const bool by_vocabulary = num_vocabularies >= 2 * threads;
    std::vector<int64_t> mine;
    std::vector<int64_t> size(num_vocabularies, 0);
    for (int64_t l = 0; l < num_lookups; ++l) size[vocabularies[l]] += in.count(l);
    std::vector<int64_t> owner(num_vocabularies, 0);
    for (int64_t v = 0, before = 0; v < num_vocabularies; before += size[v++])
      owner[v] = total ? std::min(threads - 1, (before + size[v] / 2) * threads / total) : 0;
    for (int64_t l = 0; l < num_lookups; ++l)
      if (!by_vocabulary || owner[vocabularies[l]] == me) mine.push_back(l);
    for (int64_t b = 0; b < batch_size; ++b)
      for (const int64_t l : mine) {
        const int32_t* offset = in.of(l);
        for (int64_t p = starts[l] + offset[b]; p < starts[l] + offset[b + 1]; ++p) {
          const int64_t u = inverse_P[p];
          if (u < 0 || (!by_vocabulary && u % threads != me)) continue;
          for (int64_t s = 0; s < num_slices; ++s)
            add_floats(grads_UW + u * width + firsts[s], blocks[s] + (b * num_lookups + l) * dims[s], dims[s]);
        }
      }
  }
}
