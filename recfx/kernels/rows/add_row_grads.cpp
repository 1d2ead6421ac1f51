// Adds each id's gradient, times its weight, to its unique row's, occurrences in order: the sums do not depend on the threads.
#include <omp.h>

#include "kernels/kernels.h"

EXPORT void add_row_grads(float* grads_UW, int64_t stride, const int32_t* inverse_P, const int32_t* cell_P,
                          int64_t num_positions, int64_t num_slices, const int64_t* firsts, const int64_t* dims,
                          const GradBlock* blocks, const float* weight_P) {
  constexpr int64_t CHUNK = 256;
  const int64_t count = count_ids(cell_P, num_positions);
#pragma omp parallel
  {
    // Every thread walks all ids and takes those of the unique rows it owns, and will own again in the optimiser: a
    // row's gradient stays in one core's cache from one kernel to the next.
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const bool power_of_two = (threads & (threads - 1)) == 0;  // no division then: it would be half of the walk
    const auto is_mine = [=](int32_t number) {
      return number >= 0 && (power_of_two ? (number / OWNED & (threads - 1)) == me : number / OWNED % threads == me);
    };
    int64_t position[CHUNK];
    for (int64_t begin = 0; begin < count; begin += CHUNK) {
      int64_t n = 0;
      for (int64_t k = begin; k < std::min(begin + CHUNK, count); ++k) {
        position[n] = k;
        n += is_mine(inverse_P[k]);
      }
      int32_t in_any = 0;
      for (int64_t i = 0; i < n; ++i) in_any |= cell_P[position[i]];
      if (in_any < 0) n = std::remove_if(position, position + n, [=](int64_t k) { return cell_P[k] < 0; }) - position;
      for (int64_t s = 0; s < num_slices; ++s)
        with_dim(dims[s], [&, block = blocks[s], one_stride = blocks[s].one_stride()](auto dim) {
          for (int64_t i = 0; i < n; ++i) {
            float* __restrict to = grads_UW + inverse_P[position[i]] * stride + firsts[s];
            const float* __restrict from = block.at(cell_P[position[i]], one_stride);
            const float weight = weight_P ? weight_P[position[i]] : 1.0f;
            for (int64_t c = 0; c < dim; ++c) to[c] += weight * from[c];
          }
        });
    }
  }
}
