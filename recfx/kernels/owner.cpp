// The rank that holds each (vocabulary, id). One thread: the caller has its own.
#include "table.h"

EXPORT void owner(const int64_t* id, const int32_t* vocabulary, int64_t n, int64_t world_size, int32_t* out) {
  constexpr uint64_t SALT = 0x9e3779b97f4a7c15ULL;
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t hash = hash_id(id[i], (uint64_t)(int64_t)vocabulary[i], SALT);
    out[i] = (int32_t)((uint32_t)(hash >> 33) % (uint32_t)world_size);
  }
}
