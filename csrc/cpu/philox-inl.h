// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the source of every dropout mask.
//
// Element (x, y, z) of a call draws word x % 4 of philox(key = seed, counter = (x / 4, y, z, offset)). For attention x is the key,
// y the query and z = batch * heads + head; for a matrix x is the column, y and z the low and high half of the row.

struct Words4 {
  VecU32 word[4];
};

// Lane i has its own counter (c0, c1) [i]; c2 and c3 are shared.
inline Words4 philox(uint64_t seed, VecU32 c0, VecU32 c1, uint32_t c2, uint32_t c3) {
  VecU32 a = c0, b = c1, c(c2), d(c3);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    VecU32 hi_a, lo_a, hi_c, lo_c;
    mul_hi_lo(a, 0xD2511F53u, &hi_a, &lo_a);
    mul_hi_lo(c, 0xCD9E8D57u, &hi_c, &lo_c);
    a = hi_c ^ b ^ VecU32(key0);
    b = lo_c;
    c = hi_a ^ d ^ VecU32(key1);
    d = lo_a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{a, b, c, d}};
}

// factor[x] = scale or 0 for x in [begin, begin + n) of line (y, z): the dropout factors of a run of x. Writes up to
// 4 * VecU32::kLanes floats beyond n; `begin` is a multiple of 4.
inline void dropout_factors(const Dropout& dropout, int64_t begin, int64_t n, uint32_t y, uint32_t z, float* factor) {
  constexpr int kLanes = VecU32::kLanes;
  const VecF scale(dropout.scale);
  alignas(64) float words[4][kLanes];
  for (int64_t x = 0; x < n; x += 4 * kLanes) {
    const VecU32 counter = VecU32::iota(static_cast<uint32_t>((begin + x) / 4));
    const Words4 draw = philox(dropout.seed, counter, VecU32(y), z, dropout.offset);
    for (int w = 0; w < 4; ++w) keep(ge_unsigned(draw.word[w], dropout.threshold), scale).store(words[w]);
    for (int i = 0; i < kLanes; ++i) {
      for (int w = 0; w < 4; ++w) factor[x + 4 * i + w] = words[w][i];
    }
  }
}
