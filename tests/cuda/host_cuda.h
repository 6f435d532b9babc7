// A CUDA device in one CPU thread, to run row-wise kernels (csrc/cuda/*.cuh) for their arithmetic where there is no
// GPU.
//
// Every CUDA thread of a block is a fiber. A warp's lanes run in turn, each to the next point where it waits or others
// may overtake it (a barrier, a shuffle, an arrival); which warp then goes on is host_cuda::schedule's: the order is
// not the hardware's but one that it allows, and adverse. What no barrier orders thus happens in either order in some
// schedule, and a warp that no barrier holds runs ahead of the others, or stays behind them, as far as it can. Blocks
// run one after another; those of a cluster run together, and have memory of their own only in dynamic shared memory.
// Shared memory is NaN at first. Warps are 32 wide; a warp's lanes must shuffle together. PTX instructions: host_ptx.h.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp does not leave a stack for another
#include <link.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
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
#define __shared__ static thread_local  // so that all of it lies in one place: poison_static_memory
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

// Which of the warps that can go on does: the first of an order (block by block: as they are numbered, the reverse, or
// the seed's), or any, by chance. Copies (cp.async, TMA) land at their start and products (wgmma) are computed as late
// as they may be, or the other way round; with kRandom by chance, each for itself.
enum class Order { kForward, kReverse, kShuffled, kRandom };
struct Schedule {
  Order order = Order::kForward;
  uint32_t seed = 0;
  bool late_copies = true;
};
inline Schedule schedule;
inline uint64_t chance_state;

// A number below n, from the schedule's seed.
inline unsigned chance(unsigned n) {
  chance_state = chance_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((chance_state >> 33) % n);
}

inline bool late_copy() { return schedule.order == Order::kRandom ? chance(2) == 1 : schedule.late_copies; }
[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  bool last = false;                              // goes on only when no other fiber can
  bool (*ready)(const void*, int64_t) = nullptr;  // null: it can go on
  const void* awaited = nullptr;
  int64_t value = 0;
  int shuffles = 0, products = 0;

  bool can_go_on() const { return !done && (ready == nullptr || ready(awaited, value)); }
};

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMostFibers = 8192;
inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;
inline unsigned current, threads_in_block, first_block;
inline Barrier cluster_barrier;
inline std::vector<Barrier> block_barriers, warp_barriers;
inline Barrier named_barriers[16];
inline uint64_t exchange[kMostFibers][2];  // by fiber; two slots in turn, so that a fast lane cannot overwrite what a
                                           // slow one has to read
inline int64_t events = 0;                 // counts what may let a fiber that waits go on
inline void (*entry)(void*);
inline void* entry_argument;

// The same for all lanes of a warp, whose products end together.
inline bool late_product() {
  if (schedule.order != Order::kRandom) return !schedule.late_copies;
  const uint64_t of_warp =
      (schedule.seed * 64u + current / 32) * 1024u + static_cast<unsigned>(fibers[current].products++);
  return of_warp * 6364136223846793005u >> 63 != 0;
}

// As swapcontext, without its call of the kernel.
__attribute__((noinline)) inline void leave_for(jmp_buf& from, jmp_buf& to) {
  if (_setjmp(from) == 0) _longjmp(to, 1);
}

// Other warps may go on before this one does.
inline void yield() {
  fibers[current].ready = nullptr;
  leave_for(fibers[current].place, scheduler);
}

// Returns when all others wait for each other, or for this fiber.
inline void yield_to_all() {
  fibers[current].last = true;
  yield();
}

inline void wait_until(bool (*ready)(const void*, int64_t), const void* awaited, int64_t value) {
  if (ready(awaited, value)) return;
  Fiber& fiber = fibers[current];
  fiber.ready = ready, fiber.awaited = awaited, fiber.value = value;
  leave_for(fiber.place, scheduler);
}

inline void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation, ++events;
}

// The last to come may be overtaken by those that waited.
inline void wait(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    release(barrier);
    return yield();
  }
  wait_until([](const void* at, int64_t was) { return static_cast<const Barrier*>(at)->generation != was; }, &barrier,
             generation);
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
  ++events;
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
    fail("a kernel wrote past its shared memory");
  }
}

// __shared__ is all that this library has of thread-local memory.
inline void poison_static_memory() {
  static thread_local volatile int there;  // asked for, so that the thread has the library's
  static const void* const own = reinterpret_cast<const void*>(&poison_static_memory);
  there = 1;
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void*) {
        bool ours = false;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const auto& segment = object->dlpi_phdr[i];
          const uintptr_t from = object->dlpi_addr + segment.p_vaddr, at = reinterpret_cast<uintptr_t>(own);
          ours |= segment.p_type == PT_LOAD && at >= from && at < from + segment.p_memsz;
        }
        for (int i = 0; ours && i < object->dlpi_phnum; ++i) {
          const auto& segment = object->dlpi_phdr[i];
          if (segment.p_type == PT_TLS) std::memset(object->dlpi_tls_data, kUntouched, segment.p_memsz);
        }
        return static_cast<int>(ours);
      },
      nullptr);
}

// Enters a fiber at its entry.
__attribute__((noinline)) inline void start(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get(), fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, fiber_main, 0);
  if (_setjmp(scheduler) == 0) setcontext(&fiber.start);
}

// Things under way that land at the latest when no fiber can go on before they do (host_ptx_sm90.h): lands one of
// them, and says whether there was any. And what a block leaves behind.
inline bool (*land_one)() = nullptr;
inline void (*end_of_block)() = nullptr;

// Runs each lane of a warp that can go on, once.
inline void step(unsigned warp, bool last) {
  const unsigned turn = schedule.order == Order::kRandom ? chance(32) : 0;
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned lane = schedule.order == Order::kReverse ? 31 - i : (i + turn) % 32;
    Fiber& fiber = fibers[warp * 32 + lane];
    if (!fiber.can_go_on() || (fiber.last && !last)) continue;
    current = warp * 32 + lane;
    threadIdx.x = current % threads_in_block, blockIdx.x = first_block + rank();
    fiber.last = false, fiber.ready = nullptr;
    if (__builtin_expect(fiber.started, 1)) {
      leave_for(scheduler, fiber.place);
    } else {
      fiber.started = true;
      start(fiber);
    }
  }
}

// The warps in the order in which they are asked whether they can go on.
inline std::vector<unsigned> warp_order(unsigned warps) {
  std::vector<unsigned> order(warps);
  for (unsigned i = 0; i < warps; ++i) order[i] = schedule.order == Order::kReverse ? warps - 1 - i : i;
  if (schedule.order == Order::kForward || schedule.order == Order::kReverse) return order;
  for (unsigned i = warps; i > 1; --i) std::swap(order[i - 1], order[chance(i)]);
  return order;
}

// Runs the fibers of a cluster to their ends. A warp that was found waiting is asked again when something happened.
inline void run_fibers(unsigned count) {
  const unsigned warps = count / 32;
  std::vector<unsigned> order = warp_order(warps);
  std::vector<int64_t> waits_since(warps, -1);
  const auto can_go_on = [&](unsigned warp, bool last) {
    if (waits_since[warp] == events) return false;
    bool waits = true;
    for (unsigned t = warp * 32; t < warp * 32 + 32; ++t) {
      if (!fibers[t].can_go_on()) continue;
      if (last || !fibers[t].last) return true;
      waits = false;
    }
    if (waits) waits_since[warp] = events;
    return false;
  };
  const auto step_one = [&](bool last) {
    const unsigned first = schedule.order == Order::kRandom ? chance(warps) : 0;
    for (unsigned i = 0; i < warps; ++i) {
      const unsigned warp = order[(i + first) % warps];
      if (can_go_on(warp, last)) return step(warp, last), true;
    }
    return false;
  };
  for (;;) {
    if (schedule.order == Order::kRandom && land_one != nullptr && chance(64) == 0) land_one();
    if (step_one(false)) continue;
    if (land_one != nullptr && land_one()) continue;
    if (!step_one(true)) break;
  }
  for (unsigned t = 0; t < count; ++t) {
    if (!fibers[t].done) fail("deadlock");
  }
}

// Runs body() on `blocks` blocks of `threads` with `shared` bytes of dynamic shared memory, NaN at first; `cluster`
// neighbours together. Aborts if threads wait for each other forever.
template <class F>
inline void run(int64_t blocks, int threads, int64_t shared, int cluster, F body) {
  const unsigned count = static_cast<unsigned>(threads * cluster);
  if (count > kMostFibers || blocks % cluster != 0 || threads % 32 != 0) fail("no such launch");
  entry = [](void* f) { (*static_cast<F*>(f))(); };
  entry_argument = &body;
  if (fibers.size() < count) fibers.resize(count);
  threads_in_block = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks), blockDim.x = threads_in_block;
  chance_state = schedule.seed;
  for (int64_t block = 0; block < blocks; block += cluster) {
    dynamic_memory.resize(static_cast<size_t>(cluster));
    for (auto& memory : dynamic_memory) memory.assign(static_cast<size_t>(shared) + 1024 + kGuardBytes, kUntouched);
    poison_static_memory();
    ++blocks_run;
    cluster_barrier = {static_cast<int>(count)};
    block_barriers.assign(static_cast<size_t>(cluster), Barrier{threads});
    warp_barriers.assign(count / 32, Barrier{32});
    for (Barrier& barrier : named_barriers) barrier = {};
    for (unsigned t = 0; t < count; ++t) {
      Fiber& fiber = fibers[t];
      if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
      fiber.started = fiber.done = fiber.last = false, fiber.ready = nullptr, fiber.shuffles = fiber.products = 0;
    }
    first_block = static_cast<unsigned>(block);
    run_fibers(count);
    for (const Barrier& barrier : named_barriers) {
      if (barrier.arrived != 0) fail("arrivals left at a named barrier at the end of a block");
    }
    if (end_of_block != nullptr) end_of_block();
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

// How the kernels of the calls that follow are scheduled.
extern "C" __attribute__((used)) inline void set_schedule(int order, uint32_t seed, bool late_copies) {
  host_cuda::schedule = {static_cast<host_cuda::Order>(order), seed, late_copies};
}

namespace host_cuda {

// Of a kernel whose text test_barriers_host.py changed: its synchronisation number `removed` is left out.
inline int removed = -1;
inline bool reached[1024];

inline bool kept(int number) {
  reached[number] = true;
  return number != removed;
}

}  // namespace host_cuda

extern "C" __attribute__((used)) inline void remove_barrier(int number) { host_cuda::removed = number; }
extern "C" __attribute__((used)) inline bool reached_barrier(int number) { return host_cuda::reached[number]; }
