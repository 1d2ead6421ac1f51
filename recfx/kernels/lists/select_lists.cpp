// The first numbers of each list of many columns, as one matrix.
#include "kernels/kernels.h"

EXPORT void select_lists(const float* const* values, const int32_t* const* offsets, int64_t num_columns,
                         int64_t num_lists, int64_t dim, const float* fill, float* out) {
  constexpr int64_t LISTS = 64;  // few enough that their part of the matrix stays in the cache from column to column
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < num_lists; begin += LISTS)
    for (int64_t c = 0; c < num_columns; ++c)
      for (int64_t l = begin; l < std::min(begin + LISTS, num_lists); ++l) {
        const int32_t first = offsets[c][l];
        float* to = out + (l * num_columns + c) * dim;
        for (int64_t k = 0; k < dim; ++k)  // an address is chosen, not a branch, which no predictor would guess
          to[k] = *(first + k < offsets[c][l + 1] ? values[c] + first + k : fill);
      }
}
