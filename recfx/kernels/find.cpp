// Rows of known ids; UNKNOWN for the others and for padding. Writes nothing else.
#include "find.h"

EXPORT void find(const int64_t* slots, const int64_t* ids, const int64_t* num_slots, const int64_t* salt,
                 const int64_t* values, const int32_t* offsets, const int64_t* starts, const int32_t* vocabularies,
                 int64_t num_lookups, int64_t batch_size, int64_t num_positions, int32_t* row_P) {
  const Lookups in{values, offsets, starts, vocabularies, num_lookups, batch_size};
  std::fill(row_P, row_P + num_positions, UNKNOWN);
  find_all({slots, ids, nullptr, (uint64_t)*num_slots - 1, (uint64_t)*salt}, in, row_P);
}
