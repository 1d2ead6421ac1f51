// Whether the offsets of ragged columns stay within what they count: all levels of a batch in one pass.
#include "kernels/lists/lists.h"

struct Level {
  int64_t first;      // byte of its first offset, from `base`
  int64_t num_lists;
  int64_t num_items;  // that there are to count
};

EXPORT void offsets_fit(const char* base, const Level* levels, int64_t num_levels, int64_t* fit) {
  *fit = 1;
  for (int64_t i = 0; i < num_levels; ++i) {
    const auto offsets = (const int32_t*)(base + levels[i].first);
    if (!lists_fit(offsets, levels[i].num_lists, levels[i].num_items)) *fit = 0;
  }
}
