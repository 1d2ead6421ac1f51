// Rows of all ids, inserting the new ones, with de-duplication.
//
// 1. in parallel, the index is only read: this is where the cache misses are.
// 2. one thread walks the ids in the order (sample, lookup, position): new rows, unique numbers, last-seen step.
// 3. in parallel, new rows get their initial values.
#include "find.h"

EXPORT void find_or_insert(int64_t* slots, int64_t* ids, int32_t* row_vocabularies, int64_t* seen, float* rows,
                           int64_t* num_rows, int64_t* num_refused, int32_t* unique_rows, int64_t* num_unique,
                           const int64_t* num_slots, const int64_t* salt, const int64_t* step, int64_t max_rows,
                           int64_t max_unique, int64_t row_blocks, const int64_t* values, const int32_t* offsets,
                           const int64_t* starts, const int32_t* vocabularies, int64_t num_lookups,
                           int64_t batch_size, int64_t num_positions, const int64_t* init_keys,
                           const float* init_params, int64_t width, int32_t* row_P, int32_t* inverse_P) {
  const Lookups in{values, offsets, starts, vocabularies, num_lookups, batch_size};
  const uint64_t mask = (uint64_t)*num_slots - 1;
  const int64_t room = std::min(max_rows, *num_slots / 8 * 7), first_new = *num_rows;
  std::fill(row_P, row_P + num_positions, UNKNOWN);
  std::fill(inverse_P, inverse_P + num_positions, UNKNOWN);
  find_all({slots, ids, seen, mask, (uint64_t)*salt}, in, row_P);

  int64_t fill = first_new, unique = *num_unique, refused = 0;
  const uint64_t now = (uint64_t)*step;
  for (int64_t b = 0; b < batch_size; ++b)
    for (int64_t l = 0; l < num_lookups; ++l) {
      const int32_t* offset = in.of(l);
      for (int64_t p = starts[l] + offset[b]; p < starts[l] + offset[b + 1]; ++p) {
        int64_t row = row_P[p];
        if (row == UNKNOWN) {
          uint64_t at;
          const uint64_t vocabulary = vocabularies[l], hash = hash_id(values[p], vocabulary, (uint64_t)*salt);
          row = probe(slots, ids, mask, hash, vocabulary, values[p], &at);
          if (row == UNKNOWN && fill >= room) {
            row_P[p] = REFUSED;
            ++refused;
            continue;
          }
          if (row == UNKNOWN) {
            row = fill++;
            slots[at] = make_slot(slot_head(hash, vocabulary), row);
            ids[row] = values[p];
            row_vocabularies[row] = (int32_t)vocabulary;
            seen[row] = -1;
          }
          row_P[p] = (int32_t)row;
        }
        if ((uint64_t)seen[row] >> 32 == now) {
          inverse_P[p] = (int32_t)(seen[row] & 0xffffffffLL);
        } else if (unique < max_unique) {
          seen[row] = (int64_t)(now << 32 | (uint64_t)unique);
          unique_rows[unique] = (int32_t)row;
          inverse_P[p] = (int32_t)unique++;
        } else {
          ++refused;
        }
      }
    }
  *num_rows = fill;
  *num_unique = unique;
  *num_refused += refused;

  const Initializer init{init_keys, init_params, width};
#pragma omp parallel for schedule(static)
  for (int64_t row = first_new; row < fill; ++row) {
    float* block = rows + row * row_blocks * width;
    initial_values(init, row_vocabularies[row], ids[row], 0, width, block);
    std::fill(block + width, block + row_blocks * width, 0.0f);
  }
}
