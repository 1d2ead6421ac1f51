// 64-bit hashes of strings that lie end to end, straight from Arrow's buffers.
#include "string_hash.h"
#include "table.h"

template <class Hash>
static void hash_all(const uint8_t* const* values, const int32_t* const* offsets, const int64_t* num_strings,
                     int64_t num_columns, int64_t* const* out, Hash hash) {
  for (int64_t c = 0; c < num_columns; ++c) {
#pragma omp parallel for schedule(static) if (num_strings[c] > 4096)
    for (int64_t i = 0; i < num_strings[c]; ++i)
      out[c][i] = (int64_t)hash(values[c] + offsets[c][i], offsets[c][i + 1] - offsets[c][i]);
  }
}

EXPORT void farm_hashes(const uint8_t* const* values, const int32_t* const* offsets, const int64_t* num_strings,
                        int64_t num_columns, int64_t* const* out) {
  hash_all(values, offsets, num_strings, num_columns, out, farm_hash);
}

EXPORT void murmur_hashes(const uint8_t* const* values, const int32_t* const* offsets, const int64_t* num_strings,
                          int64_t num_columns, int64_t* const* out) {
  hash_all(values, offsets, num_strings, num_columns, out, murmur_hash);
}
