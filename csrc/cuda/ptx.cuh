// PTX instructions as functions. On a host compiler tests/cuda/host_ptx.h has the same functions over the host model of
// a block (sm_90a: host_ptx_sm90.h).
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16"): with lane = 4 g + t, a[i] holds row g + 8 (i % 2), columns
// 2 t + 8 (i / 2) and the next; b[i] rows 2 t + 8 i and the next of column g; d[e] row g + 8 (e / 2), column
// 2 t + e % 2. The first of two 16-bit values is the lower half of its register.
#pragma once

#include "cuda/common.cuh"

namespace fastattn {
namespace cuda {

// A tensor as TMA reads it, innermost extent first, in elements; strides[0] is 1.
template <int kRank>
struct TensorBoxes {
  const void* data;
  int64_t extents[kRank], strides[kRank];
  int box[kRank];
};

}  // namespace cuda
}  // namespace fastattn

#if defined(__CUDACC__)

namespace fastattn {
namespace cuda {

// The dynamic shared memory of a block, at a multiple of 1024 bytes, as TMA's 128-byte swizzle asks.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Clusters (sm_90): a block's place in its cluster, and the number of blocks in it.
__device__ inline int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ inline int cluster_blocks() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}

// A barrier for all threads of the cluster: what they wrote to shared memory before it, all of them see after it.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}

// What block `rank` of the cluster has where this one has *at, in shared memory.
template <class A>
__device__ inline A cluster_load(const A* at, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(at)), "r"(rank));
  A x;
  if constexpr (sizeof(A) == 8) {
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(x) : "r"(there) : "memory");
  } else {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
  }
  return x;
}

// Programmatic dependent launch (sm_90; LaunchConfig::overlapped): once all blocks of a grid have called the first, or
// ended, the next grid's blocks may start; that grid calls the second before it reads what this one writes.
__device__ inline void let_next_grid_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous_grid() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Starts the copy of `bytes` (0 to 16) bytes from global to shared memory, past L1; zeros fill the 16 that they go to.
// Both addresses are multiples of 16.
__device__ inline void cp_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Closes the thread's group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all of the thread's groups but the kPending youngest.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lane 8 i + j has the address of row j of matrix i. The lane gets columns 2 t
// and 2 t + 1 of row g of each.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of the transposed matrices: rows 2 t and 2 t + 1 of column g.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8) of a warp.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, BFloat16>, "16-bit operands");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// A barrier of `threads` threads of the block, whole warps; id 0 is __syncthreads's.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Arrives at that barrier without waiting: `threads` are those that arrive and those that wait.
__device__ inline void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 2^x to two units in the last place; what is subnormal becomes 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What follows is of sm_90a.

// The thread's number in its warpgroup, asked anew: what follows from it need not stay in registers around a loop.
__device__ inline int warpgroup_thread() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return static_cast<int>(thread % 128);
}

// Registers of each thread of the warpgroup from here on; all its warps call.
template <int kRegisters>
__device__ inline void set_max_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void set_max_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A phase of an mbarrier ends when `count` arrivals have come and all bytes that were announced.
__device__ inline void mbarrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Makes initialized barriers visible to TMA and to the cluster; __syncthreads to the block.
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Until the phase of that parity has ended. A fresh barrier is in phase 0; waiting for parity 1 passes at once.
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::
          "r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The driver's CUtensorMap, made by tensor_map.h.
struct alignas(128) TensorMap {
  char opaque[128];
};

// One thread: the box of a matrix whose first element is (row, column), in 128-byte rows swizzled by their number mod
// 8, zero outside the matrix; counts its bytes on `barrier`.
__device__ inline void tma_load_2d(void* to, const TensorMap& map, uint64_t* barrier, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
      : "memory");
}

// The same of a tensor with five extents, whose box lies as its innermost lines, one after the other.
__device__ inline void tma_load_5d(void* to, const TensorMap& map, uint64_t* barrier, int c0, int c1, int c2, int c3,
                                   int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

// One thread starts adding `bytes` / 4 floats of shared memory to global memory, each by itself, in no order with other
// additions; addresses and bytes are multiples of 16.
__device__ inline void bulk_add(float* to, const void* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// The shared memory that the thread's committed groups read may be overwritten.
__device__ inline void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// They are done.
__device__ inline void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Makes what the thread stored in shared memory visible to wgmma and TMA.
__device__ inline void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A matrix operand of wgmma in shared memory, in 128-byte swizzled rows: K-major (rows along K) with `stride` bytes
// from one group of 8 rows to the next, or MN-major (rows across K) with `stride` from 8 terms to the next 8 and
// `leading` from 64 lines to the next 64.
__device__ inline uint64_t wgmma_descriptor(const void* p, int leading, int stride) {
  return static_cast<uint64_t>((shared_address(p) & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}

// Before the first wgmma that uses registers which other code wrote.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but the last kPending groups are done: their registers are valid, what they read may be overwritten.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// After a wait: no use of these sums may be moved before it.
template <int kSums>
__device__ inline void wgmma_fence_sums(float (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTATTN_REGISTERS_0                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTATTN_REGISTERS_64                                                                    \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTATTN_SUMS_8(i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define FASTATTN_SUMS_64(i)                                                                     \
  FASTATTN_SUMS_8(i), FASTATTN_SUMS_8(i + 8), FASTATTN_SUMS_8(i + 16), FASTATTN_SUMS_8(i + 24), \
      FASTATTN_SUMS_8(i + 32), FASTATTN_SUMS_8(i + 40), FASTATTN_SUMS_8(i + 48), FASTATTN_SUMS_8(i + 56)

#define FASTATTN_REGISTERS_0_TO_31                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTATTN_REGISTERS_0_TO_39 FASTATTN_REGISTERS_0_TO_31 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTATTN_REGISTERS_0_TO_47 FASTATTN_REGISTERS_0_TO_39 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTATTN_REGISTERS_64_TO_95                                                  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTATTN_SUMS_32(i) FASTATTN_SUMS_8(i), FASTATTN_SUMS_8(i + 8), FASTATTN_SUMS_8(i + 16), FASTATTN_SUMS_8(i + 24)
#define FASTATTN_SUMS_40 FASTATTN_SUMS_32(0), FASTATTN_SUMS_8(32)
#define FASTATTN_SUMS_48 FASTATTN_SUMS_40, FASTATTN_SUMS_8(40)
#define FASTATTN_SUMS_96 FASTATTN_SUMS_64(0), FASTATTN_SUMS_32(64)
#define FASTATTN_SUMS_128 FASTATTN_SUMS_64(0), FASTATTN_SUMS_64(64)

// d (64 x N, a warpgroup's) += a b in T, both in shared memory, MN-major if across. Lane l of warp w holds row
// 16 w + l / 4 + 8 (e / 2) and column 8 j + 2 (l % 4) + e % 2 in d[4 j + e].
#define FASTATTN_WGMMA(N, SUMS, registers, sums, a_at, b_at, across_a_at, across_b_at)                          \
  template <class T, bool kAcrossA, bool kAcrossB>                                                              \
  __device__ inline void wgmma(float (&d)[SUMS], uint64_t a, uint64_t b) {                                      \
    if constexpr (std::is_same_v<T, BFloat16>) {                                                                \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" registers "}, %" a_at ", %" b_at \
                   ", 1, 1, 1, %" across_a_at ", %" across_b_at ";"                                             \
                   : sums                                                                                       \
                   : "l"(a), "l"(b), "n"(static_cast<int>(kAcrossA)), "n"(static_cast<int>(kAcrossB)));         \
    } else {                                                                                                    \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.f16.f16 {" registers "}, %" a_at ", %" b_at   \
                   ", 1, 1, 1, %" across_a_at ", %" across_b_at ";"                                             \
                   : sums                                                                                       \
                   : "l"(a), "l"(b), "n"(static_cast<int>(kAcrossA)), "n"(static_cast<int>(kAcrossB)));         \
    }                                                                                                           \
  }
FASTATTN_WGMMA("64", 32, FASTATTN_REGISTERS_0_TO_31, FASTATTN_SUMS_32(0), "32", "33", "34", "35")
FASTATTN_WGMMA("128", 64, FASTATTN_REGISTERS_0, FASTATTN_SUMS_64(0), "64", "65", "66", "67")
FASTATTN_WGMMA("256", 128, FASTATTN_REGISTERS_0 ", " FASTATTN_REGISTERS_64, FASTATTN_SUMS_128, "128", "129", "130",
               "131")
#undef FASTATTN_WGMMA

// d = a bᵀ, or d += a bᵀ if `add`, in T: 64 rows and N = 2 kSums columns, both in shared memory and K-major.
#define FASTATTN_WGMMA_SCORES(N, SUMS, registers, sums, a_at, b_at, add_at)                                    \
  template <class T>                                                                                           \
  __device__ inline void wgmma_scores(float (&d)[SUMS], uint64_t a, uint64_t b, bool add) {                    \
    if constexpr (std::is_same_v<T, BFloat16>) {                                                               \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" N \
                   "k16.f32.bf16.bf16 {" registers "}, %" a_at ", %" b_at ", add, 1, 1, 0, 0;\n}"              \
                   : sums                                                                                      \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                              \
    } else {                                                                                                   \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" add_at ", 0;\nwgmma.mma_async.sync.aligned.m64n" N \
                   "k16.f32.f16.f16 {" registers "}, %" a_at ", %" b_at ", add, 1, 1, 0, 0;\n}"                \
                   : sums                                                                                      \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                              \
    }                                                                                                          \
  }
FASTATTN_WGMMA_SCORES("64", 32, FASTATTN_REGISTERS_0_TO_31, FASTATTN_SUMS_32(0), "32", "33", "34")
FASTATTN_WGMMA_SCORES("80", 40, FASTATTN_REGISTERS_0_TO_39, FASTATTN_SUMS_40, "40", "41", "42")
FASTATTN_WGMMA_SCORES("96", 48, FASTATTN_REGISTERS_0_TO_47, FASTATTN_SUMS_48, "48", "49", "50")
FASTATTN_WGMMA_SCORES("128", 64, FASTATTN_REGISTERS_0, FASTATTN_SUMS_64(0), "64", "65", "66")
#undef FASTATTN_WGMMA_SCORES

// d += a b in T: a, 64 rows of 16 terms, in registers laid out as mma_m16n8k16's of each warp; b in shared memory,
// MN-major, N = 2 kSums columns.
#define FASTATTN_WGMMA_VALUES(N, SUMS, registers, sums, a0, a1, a2, a3, b_at)                                         \
  template <class T>                                                                                                  \
  __device__ inline void wgmma_values(float (&d)[SUMS], const uint32_t (&a)[4], uint64_t b) {                         \
    if constexpr (std::is_same_v<T, BFloat16>) {                                                                      \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 {" registers "}, {%" a0 ", %" a1 ", %" a2 \
                   ", %" a3 "}, %" b_at ", 1, 1, 1, 1;"                                                               \
                   : sums                                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
    } else {                                                                                                          \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.f16.f16 {" registers "}, {%" a0 ", %" a1 ", %" a2   \
                   ", %" a3 "}, %" b_at ", 1, 1, 1, 1;"                                                               \
                   : sums                                                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                             \
    }                                                                                                                 \
  }
FASTATTN_WGMMA_VALUES("64", 32, FASTATTN_REGISTERS_0_TO_31, FASTATTN_SUMS_32(0), "32", "33", "34", "35", "36")
FASTATTN_WGMMA_VALUES("96", 48, FASTATTN_REGISTERS_0_TO_47, FASTATTN_SUMS_48, "48", "49", "50", "51", "52")
FASTATTN_WGMMA_VALUES("128", 64, FASTATTN_REGISTERS_0, FASTATTN_SUMS_64(0), "64", "65", "66", "67", "68")
FASTATTN_WGMMA_VALUES("192", 96, FASTATTN_REGISTERS_0 ", " FASTATTN_REGISTERS_64_TO_95, FASTATTN_SUMS_96, "96", "97",
                      "98", "99", "100")
FASTATTN_WGMMA_VALUES("256", 128, FASTATTN_REGISTERS_0 ", " FASTATTN_REGISTERS_64, FASTATTN_SUMS_128, "128", "129",
                      "130", "131", "132")
#undef FASTATTN_WGMMA_VALUES

}  // namespace cuda
}  // namespace fastattn

#endif
