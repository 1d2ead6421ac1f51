// Adds each id's gradient to its unique row's, occurrences in order: the sums do not depend on the threads.
#include <omp.h>

#include <vector>

#include "table.h"

EXPORT void add_row_grads(float* grads_UW, int64_t width, const int32_t* inverse_P, const int32_t* cell_P,
                          int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups, int64_t num_slices,
                          const int64_t* firsts, const int64_t* dims, const float* const* blocks) {
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
    for (int64_t k = 0; k < count; ++k) {
      const int64_t u = inverse_P[k];
      if (!mine[in.lookup(k)] || u < 0 || (!by_vocabulary && u % threads != me)) continue;
      for (int64_t s = 0; s < num_slices; ++s)
        add_floats(grads_UW + u * width + firsts[s], blocks[s] + cell_P[k] * dims[s], dims[s]);
    }
  }
}
