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
// C += A·B with A 16 x 32 bfloat16 and B 32 x 16 in pairs of rows.
template <int TileC, int TileA, int TileB>
inline void tile_dot_bfloat16() {
  TileMemory& tiles = tile_memory();
  for (int row = 0; row < 16; ++row) {
    __m512 sum = _mm512_load_ps(tiles.bytes[TileC][row]);
    for (int pair = 0; pair < 16; ++pair) {
      int32_t a;
      std::memcpy(&a, tiles.bytes[TileA][row] + 4 * pair, sizeof a);
      sum =
          _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)_mm512_load_si512(tiles.bytes[TileB][pair]));
    }
    _mm512_store_ps(tiles.bytes[TileC][row], sum);
  }
}

#else

// Assembly, since GCC's intrinsics paste the tile's number as text and take no template parameter.
inline int& tile_scopes() {
  static thread_local int count = 0;
  return count;
}

struct TileScope {
  TileScope() {
    if (tile_scopes()++ > 0) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    _tile_loadconfig(&configuration);
  }
  ~TileScope() {
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
