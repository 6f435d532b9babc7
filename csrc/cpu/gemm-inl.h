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

// What is packed for a product. Up to kTurnedRows rows the weight is not: packing it, which takes as long as a dozen
// rows' multiplications, would serve too few of them, and the rows themselves are the smaller operand.
constexpr int64_t kTurnedRows = 512;

template <class S>
inline Packs packs_of(const LinearParams& p) {
  const MatrixProduct& product = p.product[0];
  if (!std::is_same_v<S, double> && product.b_transposed && !product.a_transposed && p.M <= kTurnedRows) {
    return p.M <= kStreamRows ? Packs::kNothing : Packs::kA;
  }
  return p.M > p.row_block ? Packs::kB : Packs::kNothing;
}
template <class S>
inline bool streams(const LinearParams& p) {
  return !std::is_same_v<S, double> && p.packs == Packs::kNothing && p.M <= kStreamRows && p.product[0].b_transposed &&
         !p.product[0].a_transposed;
}

// The packed operand: k blocks one after the other, each with all its panels.
inline int64_t packed_columns(const LinearParams& p) { return p.packs == Packs::kA ? p.M : p.N; }
template <class G>
inline typename G::T* packed_at(const LinearParams& p, const MatrixProduct& product, int64_t k, int64_t depth,
                                int64_t column) {
  return static_cast<typename G::T*>(product.packed) +
         G::kParts * (k * round_up(packed_columns(p), G::kNr) + column * round_up(depth, G::kDepth));
}

template <class S>
inline size_t packed_bytes_of(const LinearParams& p) {
  using G = GemmOf<S>;
  return G::kParts * round_up(p.K, 32) * round_up(packed_columns(p), G::kNr) * sizeof(typename G::T);
}

// Pack rows [k, k + depth) and columns [column, column + columns) of B, or of Aᵀ.
template <class S>
inline void pack_piece(const MatrixProduct& product, bool of_a, int64_t k, int64_t depth, int64_t column,
                       int64_t columns, typename GemmOf<S>::T* packed) {
  const S* from = static_cast<const S*>(of_a ? product.a : product.b);
  const int64_t stride = of_a ? product.lda : product.ldb;
  if (of_a || product.b_transposed) {
    GemmOf<S>::pack_transposed(from + column * stride + k, stride, depth, columns, packed);
  } else {
    GemmOf<S>::pack(from + k * stride + column, stride, depth, columns, packed);
  }
}

constexpr int64_t kPackColumns = 64;  // of one work item; a multiple of every kNr

// Work item: one k block of kPackColumns columns, k blocks fastest. Products of one A share its packed form.
template <class S>
inline int64_t pack_items(const LinearParams& p) {
  const int64_t block = depth_block<GemmOf<S>>(p.K);
  const int64_t strips = (packed_columns(p) + kPackColumns - 1) / kPackColumns;
  return (p.packs == Packs::kA ? 1 : p.products) * strips * ((p.K + block - 1) / block);
}
template <class S>
inline void pack_range(const LinearParams& p, Range range) {
  using G = GemmOf<S>;
  const int64_t block = depth_block<G>(p.K), blocks = (p.K + block - 1) / block, N = packed_columns(p);
  const int64_t across = (N + kPackColumns - 1) / kPackColumns;
  for (int64_t item = range.begin; item < range.end; ++item) {
    const MatrixProduct& product = p.product[item / blocks / across];
    const int64_t k = item % blocks * block, depth = std::min(block, p.K - k);
    const int64_t column = item / blocks % across * kPackColumns, columns = std::min(kPackColumns, N - column);
    pack_piece<S>(product, p.packs == Packs::kA, k, depth, column, columns, packed_at<G>(p, product, k, depth, column));
  }
}

// Scratch of one thread: operand rows, panels of B, and Cᵀ of a turned product.
template <class S>
struct LinearScratch {
  using T = typename GemmOf<S>::T;
  T *rows, *panels;
  Acc<S>* turned;
};

// Rows of Cᵀ are an odd number of cache lines apart, so that a square of it is not in one set.
inline int64_t turned_stride(const LinearParams& p) { return round_up(p.row_block, 32) + 16; }

// Cᵀ = Bᵀ·Aᵀ for one piece of C: a few rows of the weight, where they lie if they can be read there, times the packed
// rows of A; then turned over.
template <class S>
inline void multiply_piece_turned(const LinearParams& p, const MatrixProduct& product, const Piece& piece,
                                  const LinearScratch<S>& scratch, Acc<S>* sums) {
  using G = GemmOf<S>;
  using T = typename G::T;
  constexpr int kLanes = VecF::kLanes;
  const int64_t block = depth_block<G>(p.K), stride = dense_stride<G>(block), ld = turned_stride(p);
  const int64_t groups = (piece.columns + G::kMr - 1) / G::kMr;
  for (int64_t group = 0, n = 0; group < groups; ++group) {
    const int64_t count = (piece.columns - n + groups - group - 1) / (groups - group);
    const S* weight = static_cast<const S*>(product.b) + (piece.column + n) * product.ldb;
    for (int64_t k = 0; k < p.K; k += block) {
      const int64_t depth = std::min(block, p.K - k), padded = round_up(depth, G::kDepth);
      const T* rows = scratch.rows;
      int64_t rows_stride = stride;
      if (reads_in_place<S>(product.ldb)) {
        rows = reinterpret_cast<const T*>(weight + k), rows_stride = product.ldb;
      } else {
        copy_rows(weight + k, product.ldb, count, depth, padded, scratch.rows, stride);
      }
      const char* ahead = reinterpret_cast<const char*>(weight + count * product.ldb + k * count);
      G::multiply_turned(rows, rows_stride, packed_at<G>(p, product, k, depth, piece.row), count, piece.rows,
                         rows == scratch.rows ? padded : depth, scratch.turned + n * ld, ld, k > 0, ahead,
                         count * depth * static_cast<int64_t>(sizeof(S)));
    }
    n += count;
  }
  for (int64_t n = 0; n < piece.columns; n += kLanes) {
    for (int64_t m = 0; m < piece.rows; m += kLanes) {
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = VecF::load(scratch.turned + (n + i) * ld + m);
      transpose(square);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, piece.rows - m); ++i) {
        square[i].store(sums + (m + i) * p.column_block + n);
      }
    }
  }
}

// Sums of one product over one piece, into (or added to) `sums`, row stride p.column_block.
template <class S>
inline void multiply_piece(const LinearParams& p, const MatrixProduct& product, const Piece& piece,
                           const LinearScratch<S>& scratch, Acc<S>* sums, bool accumulate) {
  using G = GemmOf<S>;
  using T = typename G::T;
  const int64_t block = depth_block<G>(p.K), stride = dense_stride<G>(block);
  const S* a = static_cast<const S*>(product.a);
  for (int64_t k = 0; k < p.K; k += block) {
    const int64_t depth = std::min(block, p.K - k), padded = round_up(depth, G::kDepth);
    const T* rows = scratch.rows;
    int64_t rows_stride = stride;
    if (product.a_transposed) {
      copy_columns(a + k * product.lda + piece.row, product.lda, piece.rows, depth, padded, scratch.rows, stride);
    } else if (reads_in_place<S>(product.lda)) {
      rows = reinterpret_cast<const T*>(a + piece.row * product.lda + k), rows_stride = product.lda;
    } else {
      copy_rows(a + piece.row * product.lda + k, product.lda, piece.rows, depth, padded, scratch.rows, stride);
    }
    const T* packed = scratch.panels;
    if (p.packs == Packs::kB) {
      packed = packed_at<G>(p, product, k, depth, piece.column);
    } else {
      pack_piece<S>(product, false, k, depth, piece.column, piece.columns, scratch.panels);
    }
    G::multiply(rows, rows_stride, packed, piece.rows, piece.columns, rows == scratch.rows ? padded : depth, sums,
                p.column_block, accumulate || k > 0);
  }
}

// f(piece, sums, sums of the second product) for every work item of `range`.
template <class S, class Finish>
inline void linear_range(const LinearParams& p, Range range, const Finish& finish) {
  using G = GemmOf<S>;
  using T = typename G::T;
  using A = Acc<S>;
  const bool turns = p.packs == Packs::kA, few = streams<S>(p), converts = few && !std::is_same_v<S, T>;
  const int64_t block = depth_block<G>(p.K), few_stride = converts ? p.K : p.product[0].lda;
  const size_t rows_size = converts ? p.M * p.K
                           : few    ? 0
                                    : round_up(turns ? G::kMr : p.row_block, kGemmRowsRead) * dense_stride<G>(block);
  const size_t panels_size = p.packs == Packs::kNothing && !few ? G::packed_size(block, p.column_block) : 0;
  const size_t sums_size = p.row_block * p.column_block, turned_size = turns ? p.column_block * turned_stride(p) : 0;
  ScratchCursor cursor(
      thread_scratch((rows_size + panels_size) * sizeof(T) + (2 * sums_size + turned_size) * sizeof(A) + 5 * 64));
  const LinearScratch<S> scratch = {cursor.take<T>(rows_size), cursor.take<T>(panels_size),
                                    cursor.take<A>(turned_size)};
  A* sums[2] = {cursor.take<A>(sums_size), cursor.take<A>(sums_size)};
  const T* rows = static_cast<const T*>(p.product[0].a);
  if (converts) {
    copy_rows(static_cast<const S*>(p.product[0].a), p.product[0].lda, p.M, p.K, p.K, scratch.rows, few_stride);
    rows = scratch.rows;
  }
  for (int64_t item = range.begin; item < range.end; ++item) {
    const Piece piece = piece_of(p, item);
    for (int i = 0; i < p.products; ++i) {
      const MatrixProduct& product = p.product[i];
      A* to = sums[p.second_apart ? i : 0];
      if (p.K == 0) {
        std::fill(to, to + sums_size, A(0));
        continue;
      }
      if constexpr (!std::is_same_v<S, double>) {
        if constexpr (kStreamRows > 0)
          if (few) {
            stream_multiply<S>(p.M, rows, few_stride, static_cast<const S*>(product.b) + piece.column * product.ldb,
                               product.ldb, piece.columns, p.K, block, to, p.column_block);
            continue;
          }
        if (turns) {
          multiply_piece_turned<S>(p, product, piece, scratch, to);
          continue;
        }
      }
      multiply_piece<S>(p, product, piece, scratch, to, i > 0 && !p.second_apart);
    }
    finish(piece, sums[0], sums[1]);
  }
}
