// csrc/cuda/operator.h and the device's side of launch.cuh where tensors lie on the CPU and kernels run in the host
// model.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "host_ptx_sm90.h"
#include "ops/tensor.h"

// The operators' tensors are on "the device"; they are registered where they do not replace the real ones.
#define is_cuda is_cpu
#define DeviceGuard HostGuard
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastattn_host, CPU, m, C10_UID)

extern "C" AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
extern "C" AOTITorchError aoti_torch_cpu_addmm_out(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                                   AtenTensorHandle, double, double);

namespace torch::stable::accelerator {
struct HostGuard {
  explicit HostGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

namespace fastattn {
namespace cuda {

// The device that is modelled, and torch's setting.
inline bool host_deterministic = false;
struct DeviceFacts {
  int capability, multiprocessors, shared;
};
inline DeviceFacts host_device = {80, 2, 227 << 10};

inline const DeviceFacts& device_facts(int) { return host_device; }
inline bool runs_sm90(int) { return host_device.capability == 90; }
inline bool deterministic_algorithms() { return host_deterministic; }
inline cudaStream_t current_stream(int32_t) { return nullptr; }

inline void* torch_cuda_function(const char* name) {
  return std::string(name) == "aoti_torch_cuda_mm_out" ? reinterpret_cast<void*>(aoti_torch_cpu_mm_out)
                                                       : reinterpret_cast<void*>(aoti_torch_cpu_addmm_out);
}

struct StreamLaunch : host_cuda::Launch {
  explicit StreamLaunch(cudaStream_t) {}
};

inline auto allocator(const Tensor& like) {
  return [&like](const Shape& shape, ScalarType type) { return torch::stable::new_empty(like, shape, type); };
}

}  // namespace cuda
}  // namespace fastattn
