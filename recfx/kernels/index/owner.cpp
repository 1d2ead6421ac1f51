// Which rank holds each (vocabulary, id). The caller has its threads.
#include "kernels/kernels.h"

EXPORT void owner(const int64_t* ids, const int32_t* vocabularies, int64_t num, int64_t world_size, int64_t* ranks) {
  constexpr uint64_t SALT = 0x9e3779b97f4a7c15ULL;
  const uint32_t num_ranks = (uint32_t)std::min<int64_t>(world_size, int64_t{1} << 31);
  for (int64_t i = 0; i < num; ++i)
    ranks[i] = (uint32_t)(hash_id(ids[i], (uint64_t)(int64_t)vocabularies[i], SALT) >> 33) % num_ranks;
}
