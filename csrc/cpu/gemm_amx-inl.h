// Gemm<BFloat16>::multiply on tile registers. A block of C is 32 x 32 in four tiles (0 1 / 2 3); 32 k of A are tiles 4
// and 5, of B (one packed panel: two tiles side by side, 128 bytes a row pair) tiles 6 and 7: 4 loads feed 4 products,
// which are the bottleneck. Blocks at the edge of M or K take A through a zero-filled copy; blocks at the edge of M or
// N give C through one.

#include "cpu/tile.h"

// Copy rows x depth of A into a 32 x 32 block of zeros.
inline void copy_edge(const BFloat16* a, int64_t lda, int64_t rows, int64_t depth, BFloat16* block) {
  const __mmask32 mask = static_cast<__mmask32>(_bzhi_u32(0xffffffffu, static_cast<unsigned>(depth)));
  for (int64_t r = 0; r < 32; ++r) {
    _mm512_store_si512(block + r * 32, _mm512_maskz_loadu_epi16(r < rows ? mask : 0, a + r * lda));
  }
}

// Tiles 0..3 = A (rows x K) times one panel. With at most 16 rows or columns the tiles beyond them are left out.
template <bool kBothRows, bool kBothColumns>
inline void tile_block(const BFloat16* a, int64_t lda, const BFloat16* panel, int64_t rows, int64_t K) {
  alignas(64) BFloat16 edge[32 * 32];
  tile_zero<0>();
  if (kBothColumns) tile_zero<1>();
  if (kBothRows) tile_zero<2>();
  if (kBothRows && kBothColumns) tile_zero<3>();
  const bool whole_rows = rows == (kBothRows ? 32 : 16);
  for (int64_t k = 0; k < K; k += 32) {
    const BFloat16* from = a + k;
    int64_t stride = lda * 2;
    if (!whole_rows || k + 32 > K) {
      copy_edge(from, lda, rows, std::min<int64_t>(32, K - k), edge);
      from = edge, stride = 64;
    }
    const char* b = reinterpret_cast<const char*>(panel + k * 32);
    tile_load<4>(from, stride);
    tile_load<6>(b, 128);
    tile_dot_bfloat16<0, 4, 6>();
    if (kBothColumns) {
      tile_load<7>(b + 64, 128);
      tile_dot_bfloat16<1, 4, 7>();
    }
    if (kBothRows) {
      tile_load<5>(reinterpret_cast<const char*>(from) + 16 * stride, stride);
      tile_dot_bfloat16<2, 5, 6>();
      if (kBothColumns) tile_dot_bfloat16<3, 5, 7>();
    }
  }
}

// Tiles 0..3 as they are, whole.
inline void tile_block_to_memory(float* to, int64_t ld, int64_t rows, int64_t columns) {
  tile_store<0>(to, ld * 4);
  if (columns > 16) tile_store<1>(to + 16, ld * 4);
  if (rows > 16) tile_store<2>(to + 16 * ld, ld * 4);
  if (rows > 16 && columns > 16) tile_store<3>(to + 16 * ld + 16, ld * 4);
}

// C (+)= the first rows x columns of a 32 x 32 block.
inline void add_block(const float* block, int64_t rows, int64_t columns, float* c, int64_t ldc, bool accumulate) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = 0; n < columns; n += 16) {
      float* out = c + r * ldc + n;
      const VecF sum = VecF::load(block + r * 32 + n);
      (accumulate ? VecF::load_n(out, std::min<int64_t>(16, columns - n)) + sum : sum)
          .store_n(out, std::min<int64_t>(16, columns - n));
    }
  }
}

// C (+)= tiles 0..3.
inline void tile_block_store(float* c, int64_t ldc, int64_t rows, int64_t columns, bool accumulate) {
  alignas(64) float block[32 * 32];
  const bool direct = !accumulate && rows == 32 && columns == 32;
  tile_block_to_memory(direct ? c : block, direct ? ldc : 32, rows, columns);
  if (!direct) add_block(block, rows, columns, c, ldc, accumulate);
}

// Bring what comes next into L2.
inline void fetch(const char* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

inline void gemm_multiply_amx(const BFloat16* a, int64_t lda, const BFloat16* packed, int64_t M, int64_t N, int64_t K,
                              float* c, int64_t ldc, bool accumulate) {
  const TileScope scope;
  const int64_t panel_size = 32 * round_up(K, 32);
  for (int64_t n = 0; n < N; n += 32) {
    const BFloat16* panel = packed + n / 32 * panel_size;
    const int64_t columns = std::min<int64_t>(32, N - n);
    for (int64_t m = 0; m < M; m += 32) {
      const int64_t rows = std::min<int64_t>(32, M - m);
      const BFloat16* from = a + m * lda;
      if (rows > 16) {
        columns > 16 ? tile_block<true, true>(from, lda, panel, rows, K)
                     : tile_block<true, false>(from, lda, panel, rows, K);
      } else {
        columns > 16 ? tile_block<false, true>(from, lda, panel, rows, K)
                     : tile_block<false, false>(from, lda, panel, rows, K);
      }
      tile_block_store(c + m * ldc + n, ldc, rows, columns, accumulate);
    }
  }
}
