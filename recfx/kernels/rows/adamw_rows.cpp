// The AdamW family on the rows of one step, then the step's gradients and unique count to zero; one step more.
#include "kernels/kernels.h"

EXPORT void adamw_rows(float* rows, float* grads_UW, int64_t* counters, const int32_t* unique_rows, int64_t row_stride,
                       int64_t grad_stride, int64_t width, const double* hyper, const bool* due, bool* is_finite) {
  if (!*due) return;
  uint32_t found = 0;  // a gradient that is NaN or infinite: here it costs nothing to look
  const float decay = hyper[0], b1 = hyper[1], c1 = hyper[2], b2 = hyper[3], c2 = hyper[4];
  const float alpha = hyper[5], eps = hyper[6], scale = hyper[7];
  const int64_t num = counters[NUM_UNIQUE], ahead = rows_ahead();
  with_dim(width, [=, &found](auto dim) {
#pragma omp parallel reduction(| : found)
    {
      uint32_t in_column[dim];  // so that columns are joined once, not in every row
      std::fill(in_column, in_column + dim, 0);
#pragma omp for schedule(static, OWNED)
      for (int64_t u = 0; u < num; ++u) {
        if (u + ahead < num)
          for (int64_t c = 0; c < 3 * dim; c += 16)
            __builtin_prefetch(rows + unique_rows[u + ahead] * row_stride + c, 1);
        float* __restrict w = rows + unique_rows[u] * row_stride;
        float* __restrict m = w + dim;
        float* __restrict v = m + dim;
        float* __restrict g = grads_UW + u * grad_stride;
#pragma omp simd
        for (int64_t c = 0; c < dim; ++c) {
          const float gc = g[c] * scale;
          in_column[c] |= is_nonfinite(g[c]);
          m[c] = b1 * m[c] + c1 * gc;
          v[c] = b2 * v[c] + c2 * gc * gc;
          w[c] = decay * w[c] - alpha * m[c] / (std::sqrt(v[c]) + eps);
          g[c] = 0.0f;
        }
      }
      for (int64_t c = 0; c < dim; ++c) found |= in_column[c];
    }
  });
  counters[NUM_UNIQUE] = 0;
  ++counters[STEP];
  if (is_finite != nullptr) *is_finite = *is_finite && !found;
}
