// Part of each list, copied end to end.
#include "kernels/kernels.h"

template <class Item>
static void take(const void* values, const int32_t* first, const int32_t* length, int64_t num_lists, int64_t capacity,
                 void* out, int32_t* offsets) {
  const Item* from = (const Item*)values;
  Item* to = (Item*)out;
  int64_t end = offsets[0] = 0;
  for (int64_t l = 0; l < num_lists; ++l) {
    end = std::min(end + length[l], capacity);
    offsets[l + 1] = (int32_t)end;
  }
#pragma omp parallel for schedule(static) if (end > 1 << 14)
  for (int64_t l = 0; l < num_lists; ++l)
    for (int64_t k = offsets[l], p = first[l]; k < offsets[l + 1]; ++k, ++p) to[k] = from[p];
  std::fill(to + end, to + capacity, Item(0));
}

// Whether every list lies within the values.
static bool within(const int32_t* first, const int32_t* length, int64_t num_lists, int64_t num_values) {
  int32_t leaves = 0;
  for (int64_t l = 0; l < num_lists; ++l)
    leaves |= length[l] < 0 || (length[l] > 0 && (first[l] < 0 || (int64_t)first[l] + length[l] > num_values));
  return !leaves;
}

// `bad`: the first column of which a list lies outside the values, where nothing is copied; else -1.
EXPORT void take_lists(const void* const* values, const int32_t* const* first, const int32_t* const* length,
                       const int64_t* num_values, const int64_t* item_bytes, const int64_t* num_lists,
                       const int64_t* capacity, void* const* out, int32_t* const* offsets, int64_t num_columns,
                       int64_t* bad) {
  *bad = -1;
  for (int64_t c = num_columns - 1; c >= 0; --c)
    if (!within(first[c], length[c], num_lists[c], num_values[c])) *bad = c;
  if (*bad >= 0) return;
  for (int64_t c = 0; c < num_columns; ++c) {
    const auto run = item_bytes[c] == 8   ? take<int64_t>
                     : item_bytes[c] == 4 ? take<int32_t>
                     : item_bytes[c] == 2 ? take<int16_t>
                                          : take<uint8_t>;
    run(values[c], first[c], length[c], num_lists[c], capacity[c], out[c], offsets[c]);
  }
}
