// What a CUDA operator needs of torch: its stream, and memory on a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/tensor.h"

namespace fastattn {
namespace cuda {

// A function of libtorch_cuda.so, or null. It exists in CUDA builds of torch only, so what is needed of it is looked up
// when first needed, not linked: one object for CUDA and CPU builds.
inline void* torch_cuda_function(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

inline cudaStream_t current_stream(int32_t device) {
  using Accessor = AOTITorchError (*)(int32_t, void**);
  static const auto accessor = reinterpret_cast<Accessor>(torch_cuda_function("aoti_torch_get_current_cuda_stream"));
  FASTATTN_CHECK(accessor != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  FASTATTN_CHECK(accessor(device, &stream) == 0, "torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// torch.are_deterministic_algorithms_enabled(), which torch's C interface has no question for: at::globalContext() and
// at::Context::deterministicAlgorithms() of libtorch_cpu.so, as they have been called since torch 1.8. True where they
// are not.
inline bool deterministic_algorithms() {
  using GlobalContext = void* (*)();
  using Question = bool (*)(const void*);
  static const auto context = reinterpret_cast<GlobalContext>(dlsym(RTLD_DEFAULT, "_ZN2at13globalContextEv"));
  static const auto question =
      reinterpret_cast<Question>(dlsym(RTLD_DEFAULT, "_ZNK2at7Context23deterministicAlgorithmsEv"));
  return context == nullptr || question == nullptr || question(context());
}

// allocate(shape, type): an empty tensor on the device of `like`, which outlives it.
inline auto allocator(const Tensor& like) {
  return [&like](const Shape& shape, ScalarType type) { return torch::stable::new_empty(like, shape, type); };
}

}  // namespace cuda
}  // namespace fastattn
