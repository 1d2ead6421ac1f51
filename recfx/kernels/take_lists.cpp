// Part of each list, copied end to end.
#include "table.h"

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

EXPORT void take_lists(const void* const* values, const int32_t* const* first, const int32_t* const* length,
                       const int64_t* item_bytes, const int64_t* num_lists, const int64_t* capacity, void* const* out,
                       int32_t* const* offsets, int64_t num_columns) {
  for (int64_t c = 0; c < num_columns; ++c) {
    const auto run = item_bytes[c] == 8 ? take<int64_t> : item_bytes[c] == 4 ? take<int32_t> : take<uint8_t>;
    run(values[c], first[c], length[c], num_lists[c], capacity[c], out[c], offsets[c]);
  }
}
