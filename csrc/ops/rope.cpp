#include "cpu/kernel_table.h"
#include "ops/tensor.h"

namespace fastattn {

namespace {

// What rope and rope_ do alike: check the tensors and rotate x into y, which may be x.
void rotate(const Tensor& x, const Tensor& y, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate) {
  RopeParams p;
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.heads = x.size(1), p.rows = x.size(2), p.head_dim = x.size(3);
  p.half_dim = cos.size(2);
  FASTATTN_CHECK(x.stride(3) == 1 || x.size(3) <= 1 || x.numel() == 0, "rope: the last stride of x is not 1");
  FASTATTN_CHECK(2 * p.half_dim <= p.head_dim && cos.size(1) == p.rows && (cos.size(0) == 1 || cos.size(0) == p.batch),
                 "rope: cos does not fit x");
  FASTATTN_CHECK(sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1) && sin.size(2) == cos.size(2),
                 "rope: sin and cos differ in shape");
  const ScalarType angle_type = accumulation_type(x.scalar_type());
  FASTATTN_CHECK(
      cos.is_contiguous() && sin.is_contiguous() && cos.scalar_type() == angle_type && sin.scalar_type() == angle_type,
      "rope: cos and sin are not contiguous in the accumulation dtype");

  p.x = x.const_data_ptr(), p.y = y.mutable_data_ptr();
  for (int i = 0; i < 3; ++i) p.x_stride[i] = x.stride(i), p.y_stride[i] = y.stride(i);
  p.cos = cos.const_data_ptr(), p.sin = sin.const_data_ptr();
  p.angle_stride_batch = cos.size(0) == 1 ? 0 : p.rows * p.half_dim;
  p.interleaved = interleaved, p.conjugate = conjugate;

  const KernelTable& table = kernels();
  const int64_t grain = 16384 / std::max<int64_t>(p.head_dim, 1) + 1;
  parallel_for(p.batch * p.heads * p.rows, grain, [&](Range range) { table.rope(p, range); });
}

void check_dimensions(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  FASTATTN_CHECK(x.dim() == 4 && cos.dim() == 3 && sin.dim() == 3, "rope: x is 4-D, cos and sin are 3-D");
}

}  // namespace

Tensor rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate) {
  check_dimensions(x, cos, sin);
  const Tensor y = empty_in_order_of(x, x.size(3));
  rotate(x, y, cos, sin, interleaved, conjugate);
  return y;
}

void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool conjugate) {
  check_dimensions(x, cos, sin);
  rotate(x, x, cos, sin, interleaved, conjugate);
}

}  // namespace fastattn
