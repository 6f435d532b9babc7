#include "cuda/epilogue.cuh"
#include "cuda/gemm_sm80.cuh"
#include "cuda/gemm_sm90.cuh"
#include "cuda/launch.cuh"
#include "cuda/operator.h"
#include "cuda/products.h"

namespace fastattn {
namespace cuda {
namespace {

// f with a null pointer of p's storage type.
template <class F>
void with_type(DType dtype, const F& f) {
  dtype == DType::kFloat16 ? f(static_cast<Half*>(nullptr)) : f(static_cast<BFloat16*>(nullptr));
}

GemmCall make_call(const LinearParams& p, int64_t residual_stride) {
  GemmCall call = {p, residual_stride, nullptr, 1, false, false};
  find_alignment(&call);
  return call;
}

// libtorch_cuda.so's products, of an interface in C; looked up like its stream.
struct TorchProducts {
  AOTITorchError (*mm)(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
  AOTITorchError (*addmm)(AtenTensorHandle out, AtenTensorHandle addend, AtenTensorHandle a, AtenTensorHandle b,
                          double beta, double alpha);
};

const TorchProducts& torch_products() {
  static const TorchProducts found = [] {
    TorchProducts products;
    products.mm = reinterpret_cast<decltype(products.mm)>(torch_cuda_function("aoti_torch_cuda_mm_out"));
    products.addmm = reinterpret_cast<decltype(products.addmm)>(torch_cuda_function("aoti_torch_cuda_addmm_out"));
    return products;
  }();
  FASTATTN_CHECK(found.mm != nullptr && found.addmm != nullptr, "this build of torch has no CUDA products");
  return found;
}

// (rows, columns) at `data`, a view that owns nothing.
Tensor view(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride,
            const Tensor& like) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {row_stride, column_stride};
  return torch::stable::from_blob(const_cast<void*>(data), {sizes, 2}, {strides, 2}, like.device(), like.scalar_type());
}

}  // namespace

Products::Products(const Tensor& x) : like_(x) {
  FASTATTN_CHECK(x.is_cuda(), "linear, ffn: x is not on a CUDA device");
  FASTATTN_CHECK(x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16,
                 "linear, ffn: the CUDA products are for float16 and bfloat16");
  device_ = x.get_device_index();
  stream_ = current_stream(device_);
}

// Without a committed measurement torch's: cuBLAS's product cannot be slower than itself, and the kernel after it
// passes memory as often as plain PyTorch's first one does. But cuBLAS picks its algorithm by the number of rows, so
// that a row's bits depend on the others: not where torch is asked to be deterministic.
bool Products::own_kernel() const { return deterministic_algorithms(); }

void Products::run(const LinearParams& p, int64_t residual_stride) const {
  if (p.M == 0 || p.N == 0) return;
  const GemmCall call = make_call(p, residual_stride);
  own_kernel() ? run_own(call) : run_torch(call);
}

void Products::run_own(GemmCall p) const {
  const bool wgmma = runs_sm90(device_) && gemm_sm90_takes(p);
  Tensor parts;
  if (p.epilogue == Epilogue::kStore && p.product[0].a_transposed) {
    p.slices = slices_of(p.M, p.N, p.K, GemmSm80::kRows, wgmma ? GemmSm90::columns(false) : GemmSm80::columns(false));
  }
  if (p.slices > 1) {
    parts = empty({p.slices, p.M, p.N}, ScalarType::Float);
    p.parts = static_cast<float*>(parts.mutable_data_ptr());
  }
  wgmma ? run_gemm_sm90(p, device_facts(device_).multiprocessors, stream_) : run_gemm_sm80(p, stream_);
  if (p.slices == 1) return;
  with_type(p.dtype,
            [&](auto* type) { launch_slice_sum<std::remove_pointer_t<decltype(type)>>(p, StreamLaunch{stream_}); });
}

void Products::torch_product(const GemmCall& p, const MatrixProduct& product, const void* bias, void* out,
                             bool add) const {
  const auto [a, b, lda, ldb, a_transposed, b_transposed, packed] = product;
  const Tensor left = view(a, p.M, p.K, a_transposed ? 1 : lda, a_transposed ? lda : 1, like_);
  const Tensor right = view(b, p.K, p.N, b_transposed ? 1 : ldb, b_transposed ? ldb : 1, like_);
  const Tensor result = view(out, p.M, p.N, p.N, 1, like_);
  const TorchProducts& torch = torch_products();
  if (add) {
    TORCH_ERROR_CODE_CHECK(torch.addmm(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else if (bias != nullptr) {
    const int64_t size[1] = {p.N}, stride[1] = {1};
    const Tensor row =
        torch::stable::from_blob(const_cast<void*>(bias), {size, 1}, {stride, 1}, like_.device(), like_.scalar_type());
    TORCH_ERROR_CODE_CHECK(torch.addmm(result.get(), row.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    TORCH_ERROR_CODE_CHECK(torch.mm(result.get(), left.get(), right.get()));
  }
}

void Products::run_torch(GemmCall p) const {
  void *product = p.c, *gate_product = nullptr;
  Tensor scratch;
  if (p.epilogue == Epilogue::kActivation) {
    if (p.pre != nullptr) product = p.pre;
    if (p.second_apart) {
      if (p.gate == nullptr) scratch = empty({p.M, p.N});
      gate_product = p.gate != nullptr ? p.gate : scratch.mutable_data_ptr();
      torch_product(p, p.product[1], p.bias[1], gate_product, false);
    }
  } else if (p.epilogue == Epilogue::kActivationGrad) {
    product = p.dpre;
  }
  torch_product(p, p.product[0], p.bias[0], product, false);
  if (p.products == 2 && !p.second_apart) torch_product(p, p.product[1], nullptr, product, true);

  const bool finished =
      p.epilogue == Epilogue::kStore ? p.residual == nullptr : p.epilogue == Epilogue::kActivation && p.c == nullptr;
  if (finished) return;
  p.bias[0] = p.bias[1] = nullptr;
  if (p.epilogue == Epilogue::kActivation) p.pre = p.gate = nullptr;
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_epilogue(p, static_cast<const T*>(product), static_cast<const T*>(gate_product), StreamLaunch{stream_});
  });
}

void Products::run_gradient(LinearParams p, void* dpre_sum, void* dgate_sum) const {
  Tensor sums;
  const int64_t blocks = ceil_div(p.M, own_kernel() ? GemmSm80::kRows : kRowsOfBlock);
  if (dpre_sum != nullptr) {
    sums = empty({2, blocks, p.N}, ScalarType::Float);
    p.dpre_sums = sums.mutable_data_ptr();
    p.dgate_sums = static_cast<float*>(p.dpre_sums) + blocks * p.N;
  }
  run(p);
  if (dpre_sum == nullptr) return;
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Tensor partial = empty({sum_chunks(blocks), p.N}, ScalarType::Float);
    const auto reduce = [&](const void* x, void* out) {
      launch_column_sum(static_cast<const float*>(x), p.N, blocks, p.N, static_cast<float*>(partial.mutable_data_ptr()),
                        static_cast<T*>(out), StreamLaunch{stream_});
    };
    reduce(p.dpre_sums, dpre_sum);
    if (dgate_sum != nullptr) reduce(p.dgate_sums, dgate_sum);
  });
}

void Products::column_sum(const void* x, int64_t stride, int64_t M, int64_t N, void* sums) const {
  const Tensor partial = empty({sum_chunks(M), N}, ScalarType::Float);
  with_type(dtype_of(like_), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_column_sum(static_cast<const T*>(x), stride, M, N, static_cast<float*>(partial.mutable_data_ptr()),
                      static_cast<T*>(sums), StreamLaunch{stream_});
  });
}

}  // namespace cuda
}  // namespace fastattn
