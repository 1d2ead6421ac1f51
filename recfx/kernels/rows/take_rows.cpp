// The weights of rows one after the other, then a status for each: 0, or the negative row, whose weights are 0.
#include "kernels/kernels.h"

EXPORT void take_rows(float* message, int64_t stride, int64_t first, int64_t num_ranks, const float* rows,
                      int64_t row_stride, const int32_t* row_M, int64_t num_rows, int64_t width) {
  constexpr int64_t AHEAD = 16;
  const int64_t capacity = num_rows / num_ranks;
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    float* block = message + rank * stride + first;
    const int32_t* row = row_M + rank * capacity;
#pragma omp parallel for
    for (int64_t k = 0; k < capacity; ++k) {
      if (k + AHEAD < capacity && row[k + AHEAD] >= 0) {
        const float* ahead = rows + row[k + AHEAD] * row_stride;
        for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(ahead + c);
      }
      float* to = block + k * width;
      if (row[k] >= 0)
        std::memcpy(to, rows + row[k] * row_stride, width * sizeof(float));
      else
        std::fill(to, to + width, 0.0f);
      block[capacity * width + k] = (float)std::min(row[k], 0);
    }
  }
}
