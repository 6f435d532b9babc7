// Tile registers: AMX's, or (FASTATTN_TARGET_TILE_EMULATION) a twin that keeps them in memory, so that kernels written
// for AMX are executed and tested on machines without it. Eight tiles of 16 rows by 64 bytes; `stride` is in bytes.
//
// A TileScope must be alive on the thread around any use. It loads the configuration (a few hundred cycles) unless an
// outer scope already did: open one around a loop of products. No torch call inside, since oneDNN configures the tiles
// its own way.

#if defined(FASTATTN_TARGET_TILE_EMULATION)

struct TileMemory {
  alignas(64) uint8_t bytes[8][16][64];
  int scopes = 0;
};
inline TileMemory& tile_memory() {
  static thread_local TileMemory memory;
  return memory;
}

struct TileScope {
  TileScope() { ++tile_memory().scopes; }
  // As TILERELEASE: nothing may rely on a tile's contents afterwards.
  ~TileScope() {
    if (--tile_memory().scopes == 0) std::memset(tile_memory().bytes, 0xff, sizeof tile_memory().bytes);
  }
};

template <int Tile>
inline void tile_zero() {
  std::memset(tile_memory().bytes[Tile], 0, sizeof tile_memory().bytes[Tile]);
}
template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(tile_memory().bytes[Tile][row], static_cast<const char*>(from) + row * stride, 64);
  }
}
template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, tile_memory().bytes[Tile][row], 64);
  }
}
// C += A·B with A 16 x 32 bfloat16 and B 32 x 16 in pairs of rows, as the manual defines TDPBF16PS: even and odd k are
// two chains of fused multiply-adds from zero, their sum is added to C, and whatever is subnormal counts as zero.
template <int TileC, int TileA, int TileB>
inline void tile_dot_bfloat16() {
  TileMemory& tiles = tile_memory();
  constexpr unsigned kSubnormalsAreZero = 0x8040;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | kSubnormalsAreZero);
  asm volatile("" : : : "memory");
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  alignas(64) float a[2][16][16];
  for (int row = 0; row < 16; ++row) {
    const __m512i pairs = _mm512_load_si512(tiles.bytes[TileA][row]);
    _mm512_store_si512(a[0][row], _mm512_slli_epi32(pairs, 16));
    _mm512_store_si512(a[1][row], _mm512_and_si512(pairs, upper));
  }
  for (int row = 0; row < 16; row += 4) {
    __m512 even[4], odd[4];
    for (int r = 0; r < 4; ++r) even[r] = odd[r] = _mm512_setzero_ps();
    for (int pair = 0; pair < 16; ++pair) {
      const __m512i b = _mm512_load_si512(tiles.bytes[TileB][pair]);
      const __m512 b0 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16));
      const __m512 b1 = _mm512_castsi512_ps(_mm512_and_si512(b, upper));
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        even[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[0][row + r][pair]), b0, even[r]);
        odd[r] = _mm512_fmadd_ps(_mm512_set1_ps(a[1][row + r][pair]), b1, odd[r]);
      }
    }
    for (int r = 0; r < 4; ++r) {
      uint8_t* c = tiles.bytes[TileC][row + r];
      _mm512_store_ps(c, _mm512_add_ps(_mm512_load_ps(c), _mm512_add_ps(even[r], odd[r])));
    }
  }
  asm volatile("" : : : "memory");
  _mm_setcsr(before);
}

#else

// Assembly, since GCC's intrinsics paste the tile's number as text and take no template parameter.
inline int& tile_scopes() {
  static thread_local int count = 0;
  return count;
}

struct TileScope {
  // Always in line: a function that configures tiles is then seen to release them.
  __attribute__((always_inline)) TileScope() {
    if (tile_scopes()++ > 0) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    _tile_loadconfig(&configuration);
  }
  __attribute__((always_inline)) ~TileScope() {
    if (--tile_scopes() == 0) _tile_release();
  }
};

template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(Tile) : "memory");
}
template <int TileC, int TileA, int TileB>
inline void tile_dot_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(TileC), "i"(TileA), "i"(TileB));
}

#endif
