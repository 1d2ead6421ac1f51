// What the kernels that read lists ask of their offsets, so that none reads or writes outside the values.
#pragma once
#include "kernels/index/table.h"

// Offsets i32 [num_lists + 1] that begin with 0, never fall, and end within num_items.
static inline bool lists_fit(const int32_t* offsets, int64_t num_lists, int64_t num_items) {
  if (num_lists < 0 || offsets[0] != 0 || offsets[num_lists] > num_items) return false;
  int32_t falls = 0;
  for (int64_t l = 0; l < num_lists; ++l) falls |= offsets[l + 1] < offsets[l];  // no way out: it is vectorised
  return !falls;
}

// The first of several columns whose lists do not fit, or -1.
static inline int64_t first_unfit(const int32_t* const* offsets, const int64_t* num_lists, const int64_t* num_items,
                                  int64_t num_columns) {
  for (int64_t c = 0; c < num_columns; ++c)
    if (!lists_fit(offsets[c], num_lists[c], num_items[c])) return c;
  return -1;
}
