// Rows of known ids; UNKNOWN for the others and for padding. Writes nothing else.
#include "kernels/index/find.h"
#include "kernels/kernels.h"

EXPORT void find(const int64_t* slots, const int64_t* ids, const int64_t* counters, const int64_t* id_P,
                 const int32_t* cell_P, int64_t num_positions, const int32_t* vocabularies, int64_t num_lookups,
                 int32_t* row_P) {
  const Ids in{id_P, cell_P, num_positions, vocabularies, num_lookups};
  find_all({slots, ids, (uint64_t)counters[NUM_SLOTS] - 1, (uint64_t)counters[SALT]}, in, row_P);
}
