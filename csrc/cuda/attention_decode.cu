// The launches of attention_decode.cuh.
#include <stdexcept>

#include "cuda/attention_decode.cuh"
#include "cuda/attention_launch.h"

namespace fastattn {
namespace cuda {

void launch_attention_decode(const DecodeParams& p, const StreamLaunch& launch) {
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_attention_decode<float>(p, launch);
    case DType::kFloat16:
      return launch_attention_decode<Half>(p, launch);
    case DType::kBFloat16:
      return launch_attention_decode<BFloat16>(p, launch);
    default:
      throw std::invalid_argument("fastattn: attention: the CUDA kernels take float16, bfloat16 and float32");
  }
}

#define FASTATTN_DECODE_WIDTH(T, kD)                                                                          \
  template __global__ void attention_decode_kernel<T, kD, PlainScores>(const __grid_constant__ DecodeParams); \
  template __global__ void attention_decode_kernel<T, kD, GeneralScores>(const __grid_constant__ DecodeParams)
#define FASTATTN_DECODE(T)       \
  FASTATTN_DECODE_WIDTH(T, 64);  \
  FASTATTN_DECODE_WIDTH(T, 128); \
  FASTATTN_DECODE_WIDTH(T, 256); \
  template __global__ void attention_combine_kernel<T>(const __grid_constant__ DecodeParams)

FASTATTN_DECODE(BFloat16);
FASTATTN_DECODE(Half);
FASTATTN_DECODE(float);

}  // namespace cuda
}  // namespace fastattn
