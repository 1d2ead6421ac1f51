// FarmHash Fingerprint64 and MurmurHash64A (seed 0) of bytes; neither reads outside [s, s + n).
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

template <class Word>
static inline uint64_t load(const uint8_t* s) {
  Word word;
  std::memcpy(&word, s, sizeof word);
  return word;
}
static inline uint64_t load64(const uint8_t* s) { return load<uint64_t>(s); }
static inline uint64_t load32(const uint8_t* s) { return load<uint32_t>(s); }
static inline uint64_t rotate(uint64_t x, int bits) { return x >> bits | x << (64 - bits); }
static inline uint64_t fold(uint64_t x) { return x ^ x >> 47; }

constexpr uint64_t MURMUR = 0xc6a4a7935bd1e995ULL;

static inline uint64_t murmur_word(uint64_t hash, uint64_t word) {
  return (hash ^ fold(word * MURMUR) * MURMUR) * MURMUR;
}
static inline uint64_t murmur_end(uint64_t hash) { return fold(fold(hash) * MURMUR); }

// The last n < 8 bytes as a little-endian number; `before`: how many bytes in front of them may be read.
static inline uint64_t tail_of(const uint8_t* s, int64_t n, bool before) {
  if (before) return load64(s + n - 8) >> (64 - 8 * n);
  if (n >= 4) return load32(s) | load32(s + n - 4) << 8 * (n - 4);
  return s[0] | (uint64_t)s[n >> 1] << 8 * (n >> 1) | (uint64_t)s[n - 1] << 8 * (n - 1);
}

static inline uint64_t murmur_hash(const uint8_t* s, int64_t n) {
  uint64_t hash = (uint64_t)n * MURMUR;
  const bool long_enough = n >= 8;
  for (; n >= 8; n -= 8, s += 8) hash = murmur_word(hash, load64(s));
  if (n > 0) hash = (hash ^ tail_of(s, n, long_enough)) * MURMUR;
  return murmur_end(hash);
}

constexpr uint64_t FARM0 = 0xc3a5c85c97cb3127ULL, FARM1 = 0xb492b66fbe98f273ULL, FARM2 = 0x9ae16a3b2f90404fULL;

static inline uint64_t farm_pair(uint64_t u, uint64_t v, uint64_t multiplier) {
  const uint64_t a = fold((u ^ v) * multiplier);
  return fold((v ^ a) * multiplier) * multiplier;
}

static inline uint64_t farm_short(const uint8_t* s, int64_t n) {  // n <= 16
  const uint64_t multiplier = FARM2 + 2 * n;
  if (n >= 8) {
    const uint64_t a = load64(s) + FARM2, b = load64(s + n - 8);
    return farm_pair(rotate(b, 37) * multiplier + a, (rotate(a, 25) + b) * multiplier, multiplier);
  }
  if (n >= 4) return farm_pair(n + (load32(s) << 3), load32(s + n - 4), multiplier);
  if (n == 0) return FARM2;
  const uint64_t y = s[0] + ((uint64_t)s[n >> 1] << 8), z = n + ((uint64_t)s[n - 1] << 2);
  return fold(y * FARM2 ^ z * FARM0) * FARM2;
}

static inline uint64_t farm_medium(const uint8_t* s, int64_t n) {  // 16 < n <= 64
  const uint64_t multiplier = FARM2 + 2 * n;
  const uint64_t a = load64(s) * (n <= 32 ? FARM1 : FARM2), b = load64(s + 8);
  const uint64_t c = load64(s + n - 8) * multiplier, d = load64(s + n - 16) * FARM2;
  const uint64_t y = rotate(a + b, 43) + rotate(c, 30) + d;
  const uint64_t z = farm_pair(y, a + rotate(b + FARM2, 18) + c, multiplier);
  if (n <= 32) return z;
  const uint64_t e = load64(s + 16) * multiplier, f = load64(s + 24);
  const uint64_t g = (y + load64(s + n - 32)) * multiplier, h = (z + load64(s + n - 24)) * multiplier;
  return farm_pair(rotate(e + f, 43) + rotate(g, 30) + h, e + rotate(f + a, 18) + g, multiplier);
}

struct FarmState {
  uint64_t x, y, z, v0, v1, w0, w1;

  static void half(const uint8_t* s, uint64_t a, uint64_t b, uint64_t* first, uint64_t* second) {
    a += load64(s);
    b = rotate(b + a + load64(s + 24), 21);
    const uint64_t before = a;
    a += load64(s + 8) + load64(s + 16);
    *first = a + load64(s + 24);
    *second = b + rotate(a, 44) + before;
  }

  // One block of 64 bytes. The last block has separate multipliers, nine times heavier on w1 and v0.
  void block(const uint8_t* s, uint64_t multiplier, uint64_t weight) {
    x = rotate(x + y + v0 + load64(s + 8), 37) * multiplier ^ w1 * weight;
    y = rotate(y + v1 + load64(s + 48), 42) * multiplier + v0 * weight + load64(s + 40);
    z = rotate(z + w0, 33) * multiplier;
    half(s, v1 * multiplier, x + w0, &v0, &v1);
    half(s + 32, z + w1, y + load64(s + 16), &w0, &w1);
    std::swap(x, z);
  }
};

static inline uint64_t farm_long(const uint8_t* s, int64_t n) {  // n > 64
  FarmState t{81 * FARM2 + load64(s), 81 * FARM1 + 113, 0, 0, 0, 0, 0};
  t.z = fold(t.y * FARM2 + 113) * FARM2;
  const uint8_t* const last = s + n - 64;
  for (int64_t blocks = (n - 1) / 64; blocks > 0; --blocks, s += 64) t.block(s, FARM1, 1);
  const uint64_t multiplier = FARM1 + ((t.z & 0xff) << 1);
  t.w0 += (n - 1) & 63;
  t.v0 += t.w0;
  t.w0 += t.v0;
  t.block(last, multiplier, 9);
  return farm_pair(farm_pair(t.v0, t.w0, multiplier) + fold(t.y) * FARM0 + t.z,
                   farm_pair(t.v1, t.w1, multiplier) + t.x, multiplier);
}

static inline uint64_t farm_hash(const uint8_t* s, int64_t n) {
  return n <= 16 ? farm_short(s, n) : n <= 64 ? farm_medium(s, n) : farm_long(s, n);
}
