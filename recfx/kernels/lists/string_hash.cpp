// 64-bit hashes of strings that lie end to end, straight from Arrow's buffers.
#include "kernels/kernels.h"
#include "kernels/lists/lists.h"
#include "kernels/lists/string_hash.h"

// `bad`: of the first column whose offsets leave its bytes, where nothing is hashed; else -1.
template <class Hash>
static void hash_all(const uint8_t* const* values, const int64_t* num_bytes, const int32_t* const* offsets,
                     const int64_t* num_strings, int64_t num_columns, int64_t* const* out, int64_t* bad, Hash hash) {
  if ((*bad = first_unfit(offsets, num_strings, num_bytes, num_columns)) >= 0) return;
  for (int64_t c = 0; c < num_columns; ++c) {
#pragma omp parallel for schedule(static) if (num_strings[c] > 4096)
    for (int64_t i = 0; i < num_strings[c]; ++i)
      out[c][i] = (int64_t)hash(values[c] + offsets[c][i], offsets[c][i + 1] - offsets[c][i]);
  }
}

EXPORT void farm_hashes(const uint8_t* const* values, const int64_t* num_bytes, const int32_t* const* offsets,
                        const int64_t* num_strings, int64_t num_columns, int64_t* const* out, int64_t* bad) {
  hash_all(values, num_bytes, offsets, num_strings, num_columns, out, bad, farm_hash);
}

EXPORT void murmur_hashes(const uint8_t* const* values, const int64_t* num_bytes, const int32_t* const* offsets,
                          const int64_t* num_strings, int64_t num_columns, int64_t* const* out, int64_t* bad) {
  hash_all(values, num_bytes, offsets, num_strings, num_columns, out, bad, murmur_hash);
}
