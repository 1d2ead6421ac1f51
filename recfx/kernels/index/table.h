// What the table kernels share. The torch definitions compute the same.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels/counters.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

constexpr int64_t EMPTY = -1;
constexpr int32_t UNKNOWN = -1;  // row of an id that is not in the table, and of padding
constexpr int32_t REFUSED = -2;  // row of an id that was to get one and did not
constexpr int32_t FREED = -1;    // vocabulary of a row that is not in use
constexpr int64_t NO_NUMBER = 0xffffffffLL;  // low half of `seen` of a row that the step touches and does not update
constexpr int64_t OWNED = 16;    // unique rows in a run that belongs to one thread; runs go round the threads
constexpr uint64_t RUN = 64;     // slots looked at before probing goes on elsewhere

static inline uint64_t mix(uint64_t x) {
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ULL;
  x ^= x >> 32;
  x *= 0xd6e8feb86659fd93ULL;
  return x ^ (x >> 32);
}

static inline uint64_t hash_id(int64_t id, uint64_t vocabulary, uint64_t salt) {
  return mix(((uint64_t)id + (vocabulary + 1) * 0x9e3779b97f4a7c15ULL) ^ salt);
}

// A slot is tag:16 | vocabulary:16 | row:32; all ones is empty.
static inline uint64_t slot_head(uint64_t hash, uint64_t vocabulary) { return (hash >> 48) << 16 | vocabulary; }
static inline int64_t make_slot(uint64_t head, int64_t row) { return (int64_t)(head << 32 | (uint64_t)row); }
static inline int64_t slot_row(int64_t slot) { return slot & 0xffffffffLL; }

// A slot may be taken by one thread while others look: whoever sees it also sees the id that was written before.
static inline int64_t load_slot(const int64_t* slot) { return __atomic_load_n(slot, __ATOMIC_ACQUIRE); }
static inline void store_slot(int64_t* slot, int64_t value) { __atomic_store_n(slot, value, __ATOMIC_RELEASE); }

// Probing looks at RUN slots in a row, then at RUN from an unrelated place, and so on: keys that all hash to one place
// cost each other one run, however many they are.
static inline uint64_t next_run(uint64_t start) { return mix(start + 0x9e3779b97f4a7c15ULL); }

// A key is crowded out when its slot is not in its first run.
static inline bool is_crowded(uint64_t at, uint64_t hash, uint64_t mask) { return ((at - hash) & mask) >= RUN; }

// Row of (vocabulary, id), or UNKNOWN; `at` ends on its slot or on the empty one where it would go.
static inline int64_t probe(const int64_t* slots, const int64_t* ids, uint64_t mask, uint64_t hash,
                            uint64_t vocabulary, int64_t id, uint64_t* at) {
  const uint64_t head = slot_head(hash, vocabulary);
  for (uint64_t start = hash;; start = next_run(start))
    for (uint64_t k = 0; k < RUN; ++k) {
      const uint64_t p = (start + k) & mask;
      const int64_t slot = load_slot(slots + p);
      if (slot == EMPTY || ((uint64_t)slot >> 32 == head && ids[slot_row(slot)] == id)) {
        *at = p;
        return slot == EMPTY ? UNKNOWN : slot_row(slot);
      }
    }
}

// The first empty slot in a key's way.
static inline uint64_t probe_empty(const int64_t* slots, uint64_t mask, uint64_t hash) {
  for (uint64_t start = hash;; start = next_run(start))
    for (uint64_t k = 0; k < RUN; ++k)
      if (slots[(start + k) & mask] == EMPTY) return (start + k) & mask;
}

// The initial weights of one row: value_c = loc_c + scale_c * quantile(x_c), x_c uniform in (-1, 1) and a function of
// (key_c, id) alone. cover_c = 0: quantile(x) = x; otherwise the normal quantile of the central share `cover_c`.
struct Initializer {
  const int64_t* keys;  // [vocabularies, width]
  const float* params;  // [vocabularies, 3, width]: loc, scale, cover
  int64_t width;
};

// 1 where the exponent bits are all ones, else 0. An integer, so that loops vectorise.
static inline uint32_t is_nonfinite(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x7f800000u) == 0x7f800000u;
}

static inline float log_positive(float x) {  // relative error below 2e-7, vectorises
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  const int32_t e = (bits - 0x3f3504f3) >> 23;  // x = 2^e m, m in [sqrt(1/2), sqrt(2))
  const int32_t m_bits = bits - (e << 23);
  float m;
  std::memcpy(&m, &m_bits, 4);
  const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float poly = 2.0f * s * (1.0f + z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9)))));
  return poly + (float)e * 0.69314718056f;
}

// Inverse error function in single precision: Giles, "Approximating the erfinv function", GPU Computing Gems 2, 2010.
static inline float erfinv_f32(float x) {
  const float w = -log_positive((1.0f - x) * (1.0f + x));
  const float a = w - 2.5f, b = std::sqrt(w) - 3.0f;
  float p = 2.81022636e-08f, q = -0.000200214257f;
  p = 3.43273939e-07f + p * a;
  p = -3.5233877e-06f + p * a;
  p = -4.39150654e-06f + p * a;
  p = 0.00021858087f + p * a;
  p = -0.00125372503f + p * a;
  p = -0.00417768164f + p * a;
  p = 0.246640727f + p * a;
  p = 1.50140941f + p * a;
  q = 0.000100950558f + q * b;
  q = 0.00134934322f + q * b;
  q = -0.00367342844f + q * b;
  q = 0.00573950773f + q * b;
  q = -0.0076224613f + q * b;
  q = 0.00943887047f + q * b;
  q = 1.00167406f + q * b;
  q = 2.83297682f + q * b;
  return (w < 5.0f ? p : q) * x;
}

static inline void initial_values(const Initializer& init, uint64_t vocabulary, int64_t id, int64_t first, int64_t dim,
                                  float* out) {
  const int64_t* keys = init.keys + vocabulary * init.width + first;
  const float* params = init.params + vocabulary * 3 * init.width + first;
  for (int64_t c = 0; c < dim; ++c) {
    const uint64_t bits = mix((uint64_t)id * 0x9e3779b97f4a7c15ULL ^ (uint64_t)keys[c]) >> 41;
    const float x = (float)(int32_t)(2 * bits + 1 - (1 << 23)) * (1.0f / (1 << 23));
    const float loc = params[c], scale = params[init.width + c], cover = params[2 * init.width + c];
    const float normal = 1.41421356237f * erfinv_f32(cover * x);
    out[c] = loc + scale * (cover == 0.0f ? x : normal);
  }
}

// cell / divisor by one multiplication, exact for 32-bit numbers. Lemire, Kaser, Kurz 2019, arXiv:1902.01961.
static inline int64_t quotient(int32_t cell, int64_t divisor) {
  const uint64_t reciprocal = UINT64_MAX / (uint64_t)divisor + 1;  // 0 for a divisor of 1
  return divisor == 1 ? cell : (int64_t)((unsigned __int128)reciprocal * (uint64_t)cell >> 64);
}

// One past the last id: all that comes after is padding, and padding may occur between ids too.
static inline int64_t count_ids(const int32_t* cell, int64_t num_positions) {
  constexpr int64_t BLOCK = 64;
  const auto are_all_padding = [cell](int64_t end) {
    int32_t all = -1;
    for (int64_t k = end - BLOCK; k < end; ++k) all &= cell[k];
    return all < 0;
  };
  int64_t end = num_positions;
  while (end >= BLOCK && are_all_padding(end)) end -= BLOCK;
  while (end > 0 && cell[end - 1] < 0) --end;
  return end;
}

// A block of gradients [samples, lookups, dim] whose first two strides are its own: a gradient that is the same for all
// lookups of a sample comes as one number.
struct GradBlock {
  const float* values;
  int64_t num_lookups, sample_stride, lookup_stride;
  bool one_stride() const { return sample_stride == num_lookups * lookup_stride; }
  const float* at(int32_t cell, bool one_stride) const {
    if (one_stride) return values + cell * lookup_stride;
    const int64_t sample = quotient(cell, num_lookups);
    return values + sample * sample_stride + (cell - sample * num_lookups) * lookup_stride;
  }
};

// The ids of one batch in the table's order; cell = sample * num_lookups + lookup, which never falls from one id to the
// next, or -1 in padding, which may stand anywhere.
struct Ids {
  const int64_t* id;
  const int32_t* cell;
  int64_t num_positions;
  const int32_t* vocabularies;  // [L], of each lookup
  int64_t num_lookups;
  int64_t count = count_ids(cell, num_positions);
  // Where the ids of `sample` and of later ones begin, or the padding before them does.
  int64_t first_of(int64_t sample) const {
    int64_t low = 0, high = count;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      int64_t id = middle;
      while (id < high && cell[id] < 0) ++id;
      if (id == high || cell[id] >= sample * num_lookups)
        high = middle;
      else
        low = id + 1;
    }
    return low;
  }
  int64_t lookup(int64_t k) const { return cell[k] - quotient(cell[k], num_lookups) * num_lookups; }
  int32_t vocabulary(int64_t k) const { return vocabularies[lookup(k)]; }
};

// What an optimiser needs to update the rows of one step.
struct StepRows {
  float* rows;
  float* grads_UW;
  int64_t* counters;
  const int32_t* unique_rows;
  const int32_t* vocabularies;  // of each row
  int64_t row_stride, grad_stride, width;
  const double* hyper;  // decay, rate, scale, then the formula's own
  const float* rates;   // [vocabularies, 2, width]: decay and rate of each weight; null: hyper's for all
  const bool* due;
  int64_t num_tables;
  const int64_t* dims;  // of the logical tables side by side
};

// How far ahead rows are fetched where runs of unique rows are dealt to threads: into a later run of the same thread.
static inline int64_t rows_ahead() { return OWNED * std::max(2, omp_get_max_threads()); }

// Calls f(dim) with the usual widths as compile-time constants, so that loops over them become a few vector instructions.
template <class F>
static inline void with_dim(int64_t dim, F f) {
  switch (dim) {
    case 1: return f(std::integral_constant<int64_t, 1>{});
    case 4: return f(std::integral_constant<int64_t, 4>{});
    case 8: return f(std::integral_constant<int64_t, 8>{});
    case 9: return f(std::integral_constant<int64_t, 9>{});
    case 16: return f(std::integral_constant<int64_t, 16>{});
    case 17: return f(std::integral_constant<int64_t, 17>{});
    case 32: return f(std::integral_constant<int64_t, 32>{});
    case 33: return f(std::integral_constant<int64_t, 33>{});
    case 64: return f(std::integral_constant<int64_t, 64>{});
    case 128: return f(std::integral_constant<int64_t, 128>{});
    default: return f(dim);
  }
}
