// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the source of every dropout
// mask.
//
// Element (x, y, z) of a call draws word x % 4 of philox(key = seed, counter = (x / 4, y, z, offset)). For attention x
// is the key, y the query and z = batch * heads + head; for a matrix x is the column, y and z the low and high half of
// the row.

template <class U>
struct PhiloxWords {
  U word[4];
};
using Words4 = PhiloxWords<VecU32>;  // per-lane counters in any order: attention

// The key of each round. In memory, so that a loop of draws reads them as operands instead of computing them again.
struct PhiloxKeys {
  uint32_t round[10][2];
};
inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t i = 0; i < 10; ++i) {
    keys.round[i][0] = static_cast<uint32_t>(seed) + i * 0x9E3779B9u;
    keys.round[i][1] = static_cast<uint32_t>(seed >> 32) + i * 0xBB67AE85u;
  }
  return keys;
}

// Lane i (of VecU32 or VecU64) has its own counter (c0, c1) [i]; c2 and c3 are shared.
template <class U>
inline PhiloxWords<U> philox(const PhiloxKeys& keys, U c0, U c1, uint32_t c2, uint32_t c3) {
  U a = c0, b = c1, c(c2), d(c3);
  for (const uint32_t* key : keys.round) {
    U hi_a, lo_a, hi_c, lo_c;
    mul_hi_lo(a, 0xD2511F53u, &hi_a, &lo_a);
    mul_hi_lo(c, 0xCD9E8D57u, &hi_c, &lo_c);
    a = hi_c ^ b ^ U(key[0]);
    b = lo_c;
    c = hi_a ^ d ^ U(key[1]);
    d = lo_a;
  }
  return {{a, b, c, d}};
}
inline Words4 philox(uint64_t seed, VecU32 c0, VecU32 c1, uint32_t c2, uint32_t c3) {
  return philox(philox_keys(seed), c0, c1, c2, c3);
}

// factor[x] = scale or 0 for x in [begin, begin + n) of line (y, z): the dropout factors of a run of x. Writes up to
// 4 * VecU32::kLanes floats beyond n; `begin` is a multiple of 4.
inline void dropout_factors(const Dropout& dropout, int64_t begin, int64_t n, uint32_t y, uint32_t z, float* factor) {
  const VecF scale(static_cast<float>(dropout.scale));
  const PhiloxKeys keys = philox_keys(dropout.seed);
  for (int64_t x = 0; x < n; x += 4 * VecU64::kLanes) {
    const VecU64 counters = VecU64::counters(static_cast<uint32_t>((begin + x) / 4));
    const PhiloxWords<VecU64> draw = philox(keys, counters, VecU64(y), z, dropout.offset);
    VecU32 words[kWordVectors];
    words_in_order(draw.word[0], draw.word[1], draw.word[2], draw.word[3], words);
    for (int w = 0; w < kWordVectors; ++w) {
      keep(ge_unsigned(words[w], dropout.threshold), scale).store(factor + x + w * VecU32::kLanes);
    }
  }
}
