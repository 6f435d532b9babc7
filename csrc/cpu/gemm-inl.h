// The large matrix product: C = A·B cut into work items of row_block x column_block elements, each with an epilogue
// while its sums are in the L2 cache.
//
// k is cut into blocks of equal depth, about 1 KiB of operand, whatever M and N are: one block of a packed panel of B
// is then 32 KiB and stays in L1 while the rows pass. The sums of the blocks are added in order, so the result of a row
// depends neither on the other rows nor on the number of threads. A is read in place if it can be; else, per k block,
// the item's rows are copied into a dense block (L2), which converts them, turns them over if A is transposed, and
// separates rows that lie in the same cache set.
//
// L2 budget with 128 x 512 items: sums 256 KiB, A 136 KiB, B streams past.

template <class G>
inline int64_t depth_block(int64_t K) {
  constexpr int64_t kMost = kMostDepth<G>;
  const int64_t blocks = std::max<int64_t>(1, (K + kMost - 1) / kMost);
  return std::max<int64_t>(32, round_up((K + blocks - 1) / blocks, 32));
}

// Rows of `dense` are a little over depth_block long: the parts of one are an odd number of cache lines apart.
template <class G>
inline int64_t dense_stride(int64_t depth) {
  return G::kParts * (depth + 64 / static_cast<int64_t>(sizeof(typename G::T)));
}

// dense[m][k] = a[m * lda + k] in the operand's form, zero for depth <= k < padded.
template <class S>
inline void copy_rows(const S* a, int64_t lda, int64_t rows, int64_t depth, int64_t padded,
                      typename GemmOf<S>::T* dense, int64_t stride) {
  using T = typename GemmOf<S>::T;
  for (int64_t m = 0; m < rows; ++m) {
    const S* from = a + m * lda;
    T* to = dense + m * stride;
    if constexpr (std::is_same_v<S, T>) {
      std::memcpy(to, from, depth * sizeof(T));
      std::memset(to + depth, 0, (padded - depth) * sizeof(T));
    } else {
      GemmOf<S>::convert_row(from, depth, to, stride);
    }
  }
}

// Rows a multiple of 4 KiB apart share one set of L1, which holds fewer of them than a register block needs.
template <class S>
inline bool reads_in_place(int64_t lda) {
  return std::is_same_v<S, typename GemmOf<S>::T> && lda * sizeof(S) % 4096 != 0;
}

// The same from a transposed matrix: dense[m][k] = a[k * lda + m]. Squares of kLanes x kLanes turn over in registers.
template <class S, class T>
inline void copy_columns(const S* a, int64_t lda, int64_t rows, int64_t depth, int64_t padded, T* dense,
                         int64_t stride) {
  constexpr int kLanes = VecF::kLanes;
  for (int64_t k = 0; k < padded; k += kLanes) {
    for (int64_t m = 0; m < rows; m += kLanes) {
      VecF block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = VecF::load_n(a + (k + i) * lda + m, k + i < depth ? std::min<int64_t>(kLanes, rows - m) : 0);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (m + i >= rows) continue;
        T* to = dense + (m + i) * stride + k;
        if constexpr (GemmOf<S>::kParts > 1) {
          GemmOf<S>::store_row(block[i], to, stride);
        } else {
          block[i].store_n(to, std::min<int64_t>(kLanes, padded - k));
        }
      }
    }
  }
}
template <class S>
inline void copy_columns(const S* a, int64_t lda, int64_t rows, int64_t depth, int64_t padded, double* dense,
                         int64_t stride) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < padded; ++k) dense[m * stride + k] = k < depth ? to_acc(a[k * lda + m]) : 0.0;
  }
}
#if defined(FASTATTN_TARGET_AVX512_BF16)
// Two rows of a (k, k + 1) make one row of 32-bit pairs.
inline void copy_columns(const BFloat16* a, int64_t lda, int64_t rows, int64_t depth, int64_t padded, BFloat16* dense,
                         int64_t stride) {
  for (int64_t k = 0; k < padded; k += 32) {
    for (int64_t m = 0; m < rows; m += 16) {
      const __mmask16 mask = lanes16(std::min<int64_t>(16, rows - m));
      VecF block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t row = k + 2 * i;
        const __m256i even = _mm256_maskz_loadu_epi16(row < depth ? mask : 0, a + row * lda + m);
        const __m256i odd = _mm256_maskz_loadu_epi16(row + 1 < depth ? mask : 0, a + (row + 1) * lda + m);
        block[i].v = _mm512_castsi512_ps(
            _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
      }
      transpose(block);
      const __mmask16 store = lanes16(std::min<int64_t>(16, (padded - k) / 2));
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (m + i < rows) _mm512_mask_storeu_ps(dense + (m + i) * stride + k, store, block[i].v);
      }
    }
  }
}
#endif

// A piece of the result: rows [row, row + rows) and columns [column, column + columns).
struct Piece {
  int64_t row, rows, column, columns;
};
inline Piece piece_of(const LinearParams& p, int64_t item) {
  const int64_t across = (p.N + p.column_block - 1) / p.column_block;
  const int64_t row = item / across * p.row_block, column = item % across * p.column_block;
  return {row, std::min(p.row_block, p.M - row), column, std::min(p.column_block, p.N - column)};
}

// Pack rows [k, k + depth) and columns [column, column + columns) of B.
template <class S>
inline void pack_piece(const MatrixProduct& product, int64_t k, int64_t depth, int64_t column, int64_t columns,
                       typename GemmOf<S>::T* packed) {
  const S* b = static_cast<const S*>(product.b);
  if (product.b_transposed) {
    GemmOf<S>::pack_transposed(b + column * product.ldb + k, product.ldb, depth, columns, packed);
  } else {
    GemmOf<S>::pack(b + k * product.ldb + column, product.ldb, depth, columns, packed);
  }
}

// Packed B: k blocks one after the other, each with all its panels.
template <class G>
inline typename G::T* packed_at(const LinearParams& p, const MatrixProduct& product, int64_t k, int64_t depth,
                                int64_t column) {
  return static_cast<typename G::T*>(product.packed) +
         G::kParts * (k * round_up(p.N, G::kNr) + column * round_up(depth, G::kDepth));
}

template <class S>
inline size_t packed_bytes_of(const LinearParams& p) {
  using G = GemmOf<S>;
  return G::kParts * round_up(p.K, 32) * round_up(p.N, G::kNr) * sizeof(typename G::T);
}

constexpr int64_t kPackColumns = 64;  // of one work item; a multiple of every kNr

template <class S>
inline void pack_range(const LinearParams& p, Range range) {
  using G = GemmOf<S>;
  const int64_t across = (p.N + kPackColumns - 1) / kPackColumns, block = depth_block<G>(p.K);
  for (int64_t item = range.begin; item < range.end; ++item) {
    const MatrixProduct& product = p.product[item / across];
    const int64_t column = item % across * kPackColumns, columns = std::min(kPackColumns, p.N - column);
    for (int64_t k = 0; k < p.K; k += block) {
      const int64_t depth = std::min(block, p.K - k);
      pack_piece<S>(product, k, depth, column, columns, packed_at<G>(p, product, k, depth, column));
    }
  }
}

// Sums of one product over one piece, into (or added to) `sums`, row stride p.column_block. `dense` and `panels` are
// scratch.
template <class S, class T>
inline void multiply_piece(const LinearParams& p, const MatrixProduct& product, const Piece& piece, T* dense, T* panels,
                           Acc<S>* sums, bool accumulate) {
  using G = GemmOf<S>;
  const int64_t block = depth_block<G>(p.K), stride = dense_stride<G>(block);
  const S* a = static_cast<const S*>(product.a);
  if constexpr (!std::is_same_v<S, double>) {
    if (product.packed == nullptr && product.b_transposed && !product.a_transposed && streams<S>(piece.rows)) {
      const S* bt = static_cast<const S*>(product.b) + piece.column * product.ldb;
      return stream_multiply<S>(piece.rows, a + piece.row * product.lda, product.lda, bt, product.ldb, piece.columns,
                                p.K, block, sums, p.column_block, accumulate);
    }
  }
  for (int64_t k = 0; k < p.K; k += block) {
    const int64_t depth = std::min(block, p.K - k), padded = round_up(depth, G::kDepth);
    const T* rows = dense;
    int64_t rows_stride = stride;
    if (product.a_transposed) {
      copy_columns(a + k * product.lda + piece.row, product.lda, piece.rows, depth, padded, dense, stride);
    } else if (reads_in_place<S>(product.lda)) {
      rows = reinterpret_cast<const T*>(a + piece.row * product.lda + k), rows_stride = product.lda;
    } else {
      copy_rows(a + piece.row * product.lda + k, product.lda, piece.rows, depth, padded, dense, stride);
    }
    const T* packed = panels;
    if (product.packed != nullptr) {
      packed = packed_at<G>(p, product, k, depth, piece.column);
    } else {
      pack_piece<S>(product, k, depth, piece.column, piece.columns, panels);
    }
    G::multiply(rows, rows_stride, packed, piece.rows, piece.columns, rows == dense ? padded : depth, sums,
                p.column_block, accumulate || k > 0);
  }
}

// f(piece, sums, sums of the second product) for every work item of `range`.
template <class S, class Finish>
inline void linear_range(const LinearParams& p, Range range, const Finish& finish) {
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;
  const int64_t block = depth_block<G>(p.K);
  const size_t dense_size = round_up(p.row_block, kGemmRowsRead) * dense_stride<G>(block);
  const size_t sums_size = p.row_block * p.column_block;
  const bool on_the_fly = p.product[0].packed == nullptr;
  const size_t panels_size = on_the_fly ? G::packed_size(block, p.column_block) : 0;
  ScratchCursor scratch(thread_scratch((dense_size + panels_size) * sizeof(T) + 2 * sums_size * sizeof(A) + 4 * 64));
  T* dense = scratch.take<T>(dense_size);
  T* panels = scratch.take<T>(panels_size);
  A* sums[2] = {scratch.take<A>(sums_size), scratch.take<A>(sums_size)};
  for (int64_t item = range.begin; item < range.end; ++item) {
    const Piece piece = piece_of(p, item);
    for (int i = 0; i < p.products; ++i) {
      A* to = sums[p.second_apart ? i : 0];
      if (p.K == 0) std::fill(to, to + sums_size, A(0));
      multiply_piece<S>(p, p.product[i], piece, dense, panels, to, i > 0 && !p.second_apart);
    }
    finish(piece, sums[0], sums[1]);
  }
}
