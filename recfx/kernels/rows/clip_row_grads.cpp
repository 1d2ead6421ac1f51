// The gradients of one step's rows: clipped in place, and the sum of their squares.
#include <vector>

#include "kernels/kernels.h"

EXPORT void clip_row_grads(float* grads_UW, const int64_t* counters, int64_t stride, const float* scale,
                           const bool* due, int64_t num_tables, const int64_t* dims, const double* limits) {
  if (!*due) return;
  const int64_t num = counters[NUM_UNIQUE];
  const float limit = limits[0] / *scale, max_norm = limits[1];
#pragma omp parallel for schedule(static)
  for (int64_t u = 0; u < num; ++u) {
    float* g = grads_UW + u * stride;
    for (int64_t t = 0; t < num_tables; g += dims[t++]) {
      float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
      for (int64_t c = 0; c < dims[t]; ++c) {
        g[c] = g[c] > limit ? limit : g[c] < -limit ? -limit : g[c];
        squares += g[c] * g[c];
      }
      const float factor = max_norm / (std::sqrt(squares) * *scale);
      if (factor < 1.0f)
        for (int64_t c = 0; c < dims[t]; ++c) g[c] *= factor;
    }
  }
}

// Summed by blocks of rows, then over the blocks in order: the same for any number of threads.
EXPORT void squared_norm(const float* grads_UW, const int64_t* counters, int64_t stride, int64_t width, double* out) {
  constexpr int64_t BLOCK = 256;
  const int64_t num = counters[NUM_UNIQUE], num_blocks = (num + BLOCK - 1) / BLOCK;
  std::vector<double> sums(num_blocks, 0.0);
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < num_blocks; ++b) {
    double sum = 0.0;
    for (int64_t u = b * BLOCK; u < std::min((b + 1) * BLOCK, num); ++u) {
      const float* g = grads_UW + u * stride;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = 0; c < width; ++c) sum += (double)g[c] * g[c];
    }
    sums[b] = sum;
  }
  *out = 0.0;
  for (const double sum : sums) *out += sum;
}
