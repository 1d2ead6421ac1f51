// The pairs of distinct ids of two ragged features, hashed.
#include <vector>

#include "kernels/kernels.h"
#include "kernels/lists/lists.h"
#include "kernels/lists/string_hash.h"

struct Side {
  const int64_t* id;
  const int32_t* offsets;
  const float* weights;  // or null: all 1
  int32_t* first;        // [capacity]: places of the distinct ids of list l, from offsets[l] on
  float weight(int64_t place) const { return weights ? weights[place] : 1.0f; }

  // How many distinct ids list l holds. Short lists compare with all before; long ones go through a small hash table.
  int32_t distinct(int64_t l, std::vector<int32_t>& table) const {
    const int32_t begin = offsets[l], end = offsets[l + 1];
    int32_t* const out = first + begin;
    int32_t n = 0;
    if (end - begin <= 16) {
      for (int32_t p = begin; p < end; ++p)
        if (std::none_of(out, out + n, [&](int32_t q) { return id[q] == id[p]; })) out[n++] = p;
      return n;
    }
    size_t size = 64;
    while (size < 2 * (size_t)(end - begin)) size *= 2;
    table.assign(size, -1);
    for (int32_t p = begin; p < end; ++p) {
      size_t at = mix((uint64_t)id[p]) & (size - 1);
      while (table[at] >= 0 && id[table[at]] != id[p]) at = (at + 1) & (size - 1);
      if (table[at] < 0) out[n++] = table[at] = p;
    }
    return n;
  }
};

// `bad`: 0 or 1 where the offsets of x or y leave its ids, and nothing is written; else -1.
EXPORT void cross_lists(const int64_t* x, const int32_t* x_offsets, const float* x_weights, const int64_t* y,
                        const int32_t* y_offsets, const float* y_weights, int64_t num_lists, int64_t capacity,
                        int32_t* x_first, int32_t* y_first, int32_t* counts, int64_t* out, float* out_weights,
                        int32_t* offsets, int64_t* overflow, int64_t num_x, int64_t num_y, int64_t* bad) {
  *bad = !lists_fit(x_offsets, num_lists, num_x) ? 0 : !lists_fit(y_offsets, num_lists, num_y) ? 1 : -1;
  if (*bad >= 0) return;
  const Side a{x, x_offsets, x_weights, x_first}, b{y, y_offsets, y_weights, y_first};
#pragma omp parallel
  {
    std::vector<int32_t> table;
#pragma omp for schedule(static)
    for (int64_t l = 0; l < num_lists; ++l) {
      counts[2 * l] = a.distinct(l, table);
      counts[2 * l + 1] = b.distinct(l, table);
    }
  }
  int64_t total = offsets[0] = 0;
  for (int64_t l = 0; l < num_lists; ++l) {
    total += (int64_t)counts[2 * l] * counts[2 * l + 1];
    offsets[l + 1] = (int32_t)std::min(total, capacity);
  }
  const int64_t end = offsets[num_lists];
  *overflow = total - end;
#pragma omp parallel for schedule(static)
  for (int64_t l = 0; l < num_lists; ++l) {
    const int32_t *first_a = x_first + x_offsets[l], *first_b = y_first + y_offsets[l];
    for (int64_t k = offsets[l], i = 0; k < offsets[l + 1]; ++i) {
      const int32_t p = first_a[i];
      const uint64_t begun = murmur_word(16 * MURMUR, (uint64_t)x[p]);
      const int64_t stop = std::min<int64_t>(k + counts[2 * l + 1], offsets[l + 1]);
      for (int64_t j = 0; k < stop; ++k, ++j) {
        const int32_t q = first_b[j];
        out[k] = (int64_t)murmur_end(murmur_word(begun, (uint64_t)y[q]));
        out_weights[k] = a.weight(p) * b.weight(q);
      }
    }
  }
  std::fill(out + end, out + capacity, 0);
  std::fill(out_weights + end, out_weights + capacity, 0.0f);
}
