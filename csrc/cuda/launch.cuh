// What a launch asks for, and how it is asked of the CUDA runtime. No torch.
//
// A kernel's `launch_*` function (<op>*.cuh) describes each launch by a LaunchConfig and calls launch(name, kernel,
// config, arguments...). Here that is a StreamLaunch; in tests/cuda it is the host model of a thread block, which takes
// the same call.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include <string>
#include <utility>
#endif

namespace fastattn {
namespace cuda {

// `shared`: dynamic shared memory of a block in bytes. `cluster`: blocks, neighbours along x, that run at the same time
// and read each other's shared memory (sm_90); blocks_x is a multiple of it. `overlapped`: may start before the kernel
// launched before it has ended, for whose results it waits itself (sm_90; wait_for_previous_grid in ptx.cuh).
struct LaunchConfig {
  int64_t blocks_x = 1;
  int threads = 1;
  int64_t shared = 0;
  int64_t blocks_y = 1, blocks_z = 1;
  int cluster = 1;
  bool overlapped = false;
};

#if defined(__CUDACC__)

// Throws std::runtime_error: kernel, configuration, CUDA's text and name of the error.
[[noreturn]] void raise_launch_error(const char* kernel, const LaunchConfig& config, cudaError_t error);

// A function of the driver, looked up at run time, so that nothing links to libcuda: the object loads where there is no
// driver. `version` is the CUDA version whose form of the function is meant (12000 is 12.0). Throws where there is
// none.
void* driver_function(const char* name, unsigned version);

// What a choice of kernel may depend on. `capability`: 80, 90, ...; `shared`: most dynamic shared memory of a block.
struct DeviceFacts {
  int capability, multiprocessors, shared;
};
const DeviceFacts& device_facts(int device);  // throws std::runtime_error

// Whether the device runs the object's machine code for sm_90a. Where that was not compiled, Hopper runs the PTX of
// another architecture, which has neither clusters nor a wait for the previous grid.
inline bool runs_sm90([[maybe_unused]] int device) {
#if defined(FASTATTN_CUDA_SM90)
  return device_facts(device).capability == 90;
#else
  return false;
#endif
}

struct StreamLaunch {
  cudaStream_t stream;

  template <class... Parameters, class... Arguments>
  void operator()(const char* name, void (*kernel)(Parameters...), const LaunchConfig& config,
                  Arguments&&... arguments) const {
    // A kernel gets more than this only if it asks, and once asked it keeps the largest amount that was.
    constexpr int64_t kUnasked = 48 << 10;
    if (config.shared > kUnasked) {
      const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(config.shared));
      if (error != cudaSuccess) raise_launch_error(name, config, error);
    }
    // Eight is what every device of sm_90 runs; more must be asked for.
    if (config.cluster > 8) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
      if (error != cudaSuccess) raise_launch_error(name, config, error);
    }
    cudaLaunchAttribute attributes[2] = {};
    unsigned asked = 0;
    if (config.cluster > 1) {
      attributes[asked].id = cudaLaunchAttributeClusterDimension;
      attributes[asked++].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
    }
    if (config.overlapped) {
      attributes[asked].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[asked++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t request = {};
    request.gridDim = dim3(static_cast<unsigned>(config.blocks_x), static_cast<unsigned>(config.blocks_y),
                           static_cast<unsigned>(config.blocks_z));
    request.blockDim = dim3(static_cast<unsigned>(config.threads));
    request.dynamicSmemBytes = static_cast<size_t>(config.shared);
    request.stream = stream;
    request.attrs = attributes;
    request.numAttrs = asked;
    const cudaError_t error = cudaLaunchKernelEx(&request, kernel, std::forward<Arguments>(arguments)...);
    if (error != cudaSuccess) raise_launch_error(name, config, error);
  }
};

#endif

}  // namespace cuda
}  // namespace fastattn
