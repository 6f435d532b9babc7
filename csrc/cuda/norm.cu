// The CUDA operators behind LibTorch's stable ABI: one object for CUDA and CPU builds of torch.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "cuda/norm.cuh"
#include "ops/norm.h"

namespace fastattn {
namespace cuda {
namespace {

// libtorch_cuda.so exists in CUDA builds of torch only, so its stream accessor is looked up when first needed, not
// linked.
cudaStream_t current_stream(int32_t device) {
  using Accessor = AOTITorchError (*)(int32_t, void**);
  static const Accessor accessor = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<Accessor>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  FASTATTN_CHECK(accessor != nullptr, "this build of torch has no CUDA");
  void* stream = nullptr;
  FASTATTN_CHECK(accessor(device, &stream) == 0, "torch gave no CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

struct StreamLaunch {
  cudaStream_t stream;
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
    const cudaError_t error = cudaGetLastError();
    FASTATTN_CHECK(error == cudaSuccess, "norm: launch failed: ", cudaGetErrorString(error));
  }
};

auto allocator(const Tensor& like) {
  return [&like](std::initializer_list<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), type);
  };
}

}  // namespace

NormResults norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, bool rms, double dropout_p,
                         const OptionalTensor& rng_state) {
  FASTATTN_CHECK(x.is_cuda(), "norm: x is not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  NormForwardParams p;
  const NormResults results =
      prepare_norm_forward(x, residual, weight, bias, eps, rms, make_dropout(dropout_p, rng_state), &p, allocator(x));
  launch_norm_forward(p, StreamLaunch{current_stream(x.get_device_index())});
  return results;
}

NormResults norm_backward(const Tensor& dy, const OptionalTensor& dh, const Tensor& h, const OptionalTensor& weight,
                          const Tensor& mean, const Tensor& rstd, bool rms, double dropout_p,
                          const OptionalTensor& rng_state, bool weight_grad, bool bias_grad) {
  FASTATTN_CHECK(h.is_cuda(), "norm: h is not on a CUDA device");
  const torch::stable::accelerator::DeviceGuard guard(h.get_device_index());
  NormBackwardParams p;
  std::tuple<Tensor, Tensor> partials;
  const NormResults results =
      prepare_norm_backward(dy, dh, h, weight, mean, rstd, rms, make_dropout(dropout_p, rng_state), weight_grad,
                            bias_grad, &p, &partials, allocator(h), norm_chunk_rows);
  launch_norm_backward(p, StreamLaunch{current_stream(h.get_device_index())});
  return results;
}

}  // namespace cuda
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("norm_forward", TORCH_BOX(&fastattn::cuda::norm_forward));
  m.impl("norm_backward", TORCH_BOX(&fastattn::cuda::norm_backward));
}
