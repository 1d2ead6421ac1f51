// Rows to their places in a table. One thread: the caller has its own.
#include "table.h"

template <class Size>
static void place(char* target, int64_t stride, Size row_bytes, const char* source, int64_t num_rows,
                  const int32_t* at) {
  for (int64_t k = 0; k < num_rows; ++k)
    if (at[k] >= 0) std::memcpy(target + at[k] * stride, source + k * (int64_t)row_bytes, (size_t)(int64_t)row_bytes);
}

EXPORT void place_rows(char* target, int64_t stride, int64_t row_bytes, const char* source, int64_t num_rows,
                       const int32_t* at) {
  with_dim(row_bytes, [&](auto bytes) { place(target, stride, bytes, source, num_rows, at); });
}
