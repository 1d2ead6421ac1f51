// Whether numbers are finite: their exponent bits are not all ones. Integers, so that the loops vectorise.
#include <omp.h>

#include <algorithm>

#include "table.h"

constexpr int64_t CHUNK = 4096;  // numbers of a tensor that one thread takes at a time

static bool has_nonfinite(const float* x, int64_t n) {
  uint32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    found |= (uint32_t)((bits & 0x7f800000u) == 0x7f800000u);
  }
  return found != 0;
}

// With what is between the rows, which is 0 in a table's memory: one long loop. Only where that finds something, without.
static bool rows_have_nonfinite(const float* first, int64_t num, int64_t stride, int64_t width) {
  if (!has_nonfinite(first, (num - 1) * stride + width)) return false;
  bool found = false;
  for (int64_t u = 0; u < num; ++u) found = found || has_nonfinite(first + u * stride, width);
  return found;
}

// `tensors` [num_tensors] of lengths[i] numbers each; `grads` [num_tables] of num_unique[t] rows of widths[t] numbers.
EXPORT void all_finite(const float* const* tensors, const int64_t* lengths, int64_t num_tensors,
                       const float* const* grads, const int64_t* const* num_unique, const int64_t* strides,
                       const int64_t* widths, int64_t num_tables, bool* out) {
  bool found = false;
#pragma omp parallel reduction(|| : found)
  {
    for (int64_t i = 0; i < num_tensors; ++i) {
#pragma omp for schedule(static) nowait
      for (int64_t begin = 0; begin < lengths[i]; begin += CHUNK)
        found = found || has_nonfinite(tensors[i] + begin, std::min(CHUNK, lengths[i] - begin));
    }
    for (int64_t t = 0; t < num_tables; ++t) {
      const int64_t num = *num_unique[t];
      // The rows of a run are in the cache of the thread that sums and updates them.
#pragma omp for schedule(static, 1) nowait
      for (int64_t begin = 0; begin < num; begin += OWNED) {
        const int64_t rows = std::min(OWNED, num - begin);
        found = found || rows_have_nonfinite(grads[t] + begin * strides[t], rows, strides[t], widths[t]);
      }
    }
  }
  *out = !found;
}
