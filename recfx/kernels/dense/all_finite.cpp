// Whether numbers are finite.
#include <omp.h>

#include <algorithm>

#include "kernels/kernels.h"

static bool has_nonfinite(const float* x, int64_t n) {
  uint32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; ++i) found |= is_nonfinite(x[i]);
  return found != 0;
}

// With what is between the rows, which is 0 in a table's memory: one long loop. Only where that finds something, without.
static bool rows_have_nonfinite(const float* first, int64_t num, int64_t stride, int64_t width) {
  if (num <= 0 || !has_nonfinite(first, (num - 1) * stride + width)) return false;
  bool found = false;
  for (int64_t u = 0; u < num; ++u) found = found || has_nonfinite(first + u * stride, width);
  return found;
}

constexpr int64_t FEW = 1 << 16;  // numbers that take as long as the threads to come and go

// Matrices of num[i] rows of width[i] numbers, stride[i] from one row to the next. Rows are dealt to threads as those of a
// step's gradients are: another core would have to fetch them from the one that summed them and is to update them.
EXPORT void all_finite(const float* const* first, const int64_t* num, const int64_t* stride, const int64_t* width,
                       int64_t num_matrices, bool* out) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_matrices; ++i) total += num[i] * width[i];
  bool found = false;
#pragma omp parallel reduction(|| : found) if (total > FEW)
  {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t i = 0; i < num_matrices; ++i)
      for (int64_t begin = me * OWNED; begin < num[i]; begin += threads * OWNED)
        found = found || rows_have_nonfinite(first[i] + begin * stride[i], std::min(OWNED, num[i] - begin), stride[i],
                                             width[i]);
  }
  *out = !found;
}
