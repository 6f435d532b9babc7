// A CUDA device in one CPU thread, to run row-wise kernels (csrc/cuda/*.cuh) for their arithmetic where there is no
// GPU.
//
// Every CUDA thread of a block is a fiber. __syncthreads and the shuffles are barriers: a fiber that waits lets the
// next one run. Blocks run one after another, so __shared__ is static memory; those of a cluster run together, and have
// memory of their own only in dynamic shared memory. Warps are 32 wide; a warp's lanes must shuffle together. PTX
// instructions: host_ptx.h.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/launch.cuh"

#define __host__
#define __grid_constant__
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using std::sqrt;

namespace host_cuda {

struct Index {
  unsigned x = 0;
};

// Counts arrivals; complete when all `size` fibers that still run have come.
struct Barrier {
  int size = 0, arrived = 0;
  int64_t generation = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
  int shuffles = 0;
};

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMostFibers = 8192;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned current, threads_in_block;
inline Barrier cluster_barrier;
inline std::vector<Barrier> block_barriers, warp_barriers;
inline uint64_t exchange[kMostFibers][2];  // by fiber; two slots in turn, so that a fast lane cannot overwrite what a
                                           // slow one has to read
inline int64_t progress = 0;               // counts what may let a fiber that waits go on
inline void (*entry)(void*);
inline void* entry_argument;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation, ++progress;
}

inline void wait(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.size) return release(barrier);
  while (barrier.generation == generation) yield();
}

inline void leave(Barrier& barrier) {
  if (--barrier.size > 0 && barrier.arrived == barrier.size) release(barrier);
}

// The place of the fiber's block among those that run together.
inline unsigned rank() { return current / threads_in_block; }

inline void fiber_main() {
  entry(entry_argument);
  fibers[current].done = true;
  leave(cluster_barrier);
  leave(block_barriers[rank()]);
  leave(warp_barriers[current / 32]);
  yield();
}

}  // namespace host_cuda

inline host_cuda::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { host_cuda::wait(host_cuda::block_barriers[host_cuda::rank()]); }

inline void __syncwarp() { host_cuda::wait(host_cuda::warp_barriers[host_cuda::current / 32]); }

namespace host_cuda {

// What every lane of the warp gave as x, by lane: valid until the warp's next but one exchange.
template <class T>
struct Given {
  unsigned first;
  int slot;
  T operator[](unsigned lane) const {
    T x;
    std::memcpy(&x, &exchange[first + lane][slot], sizeof x);
    return x;
  }
};

template <class T>
inline Given<T> give(T x) {
  const unsigned self = current;
  const int slot = fibers[self].shuffles++ % 2;
  std::memcpy(&exchange[self][slot], &x, sizeof x);
  __syncwarp();
  return {self / 32 * 32, slot};
}

}  // namespace host_cuda

template <class T>
inline T __shfl_xor_sync(unsigned, T x, int lane_mask) {
  return host_cuda::give(x)[host_cuda::current % 32 ^ static_cast<unsigned>(lane_mask)];
}

template <class T>
inline T __shfl_sync(unsigned, T x, int lane) {
  return host_cuda::give(x)[static_cast<unsigned>(lane) % 32];
}

inline unsigned __ballot_sync(unsigned, bool x) {
  const auto given = host_cuda::give(x);
  unsigned lanes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) lanes |= static_cast<unsigned>(given[lane]) << lane;
  return lanes;
}

namespace host_cuda {

// The dynamic shared memory of the blocks that run, and bytes beyond it that no kernel may touch.
inline std::vector<std::vector<char>> dynamic_memory;
constexpr size_t kGuardBytes = 4096;
constexpr char kUntouched = static_cast<char>(0xff);  // as any floating-point type: NaN
inline int64_t blocks_run = 0;

inline char* dynamic_start(unsigned block = rank()) {
  char* data = dynamic_memory[block].data();
  return data + (1024 - reinterpret_cast<uintptr_t>(data) % 1024) % 1024;
}

inline void check_guard(unsigned block, int64_t shared) {
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (dynamic_start(block)[shared + static_cast<int64_t>(i)] == kUntouched) continue;
    std::fprintf(stderr, "a kernel wrote past its %lld bytes of shared memory\n", static_cast<long long>(shared));
    std::abort();
  }
}

// Runs body() on `blocks` blocks of `threads` with `shared` bytes of dynamic shared memory, NaN at first; `cluster`
// neighbours together. Aborts if threads wait for each other forever.
template <class F>
inline void run(int64_t blocks, int threads, int64_t shared, int cluster, F body) {
  const unsigned count = static_cast<unsigned>(threads * cluster);
  if (count > kMostFibers || blocks % cluster != 0) std::fprintf(stderr, "no such launch\n"), std::abort();
  entry = [](void* f) { (*static_cast<F*>(f))(); };
  entry_argument = &body;
  if (fibers.size() < count) fibers.resize(count);
  threads_in_block = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = threads_in_block;
  for (int64_t block = 0; block < blocks; block += cluster) {
    dynamic_memory.resize(static_cast<size_t>(cluster));
    for (auto& memory : dynamic_memory) memory.assign(static_cast<size_t>(shared) + 1024 + kGuardBytes, kUntouched);
    ++blocks_run;
    cluster_barrier = {static_cast<int>(count)};
    block_barriers.assign(static_cast<size_t>(cluster), Barrier{threads});
    warp_barriers.assign(count / 32, Barrier{32});
    for (unsigned t = 0; t < count; ++t) {
      Fiber& fiber = fibers[t];
      if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
      fiber.done = false, fiber.shuffles = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get(), fiber.context.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber.context, fiber_main, 0);
    }
    for (unsigned running = count; running > 0;) {
      const int64_t before = progress;
      for (unsigned t = 0; t < count; ++t) {
        if (fibers[t].done) continue;
        current = t, threadIdx.x = t % threads_in_block, blockIdx.x = static_cast<unsigned>(block) + rank();
        swapcontext(&scheduler, &fibers[t].context);
        if (fibers[t].done) --running, ++progress;
      }
      if (running > 0 && progress == before) {
        std::fprintf(stderr, "deadlock in block %lld\n", static_cast<long long>(block));
        std::abort();
      }
    }
    for (unsigned of = 0; of < static_cast<unsigned>(cluster); ++of) check_guard(of, shared);
  }
}

struct Launch {
  template <class... Parameters, class... Arguments>
  void operator()(const char*, void (*kernel)(Parameters...), const fastattn::cuda::LaunchConfig& config,
                  const Arguments&... arguments) const {
    run(config.blocks_x, config.threads, config.shared, config.cluster, [&] { kernel(arguments...); });
  }
};

}  // namespace host_cuda
