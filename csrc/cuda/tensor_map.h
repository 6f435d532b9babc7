// TMA's view of a tensor, from the driver's function looked up at run time.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace fastattn {
namespace cuda {

// Of 16-bit elements T: boxes whose lines, of at most 128 bytes, are swizzled; what lies outside reads as zero. `data`
// and the strides are multiples of 16 bytes, no extent is 0; the stride of an extent of 1 may be anything.
template <class T, int kRank>
TensorMap make_boxes_map(const TensorBoxes<kRank>& x) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  static const auto encode =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function("cuTensorMapEncodeTiled", 12000));
  const CUtensorMapDataType type =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  cuuint64_t extents[kRank], strides[kRank];
  cuuint32_t box[kRank], steps[kRank];
  for (int i = 0; i < kRank; ++i) {
    extents[i] = static_cast<cuuint64_t>(x.extents[i]);
    // From an element to the next of extent i + 1 is stride i of the driver's.
    strides[i > 0 ? i - 1 : kRank - 1] = x.extents[i] == 1 ? 16 : static_cast<cuuint64_t>(x.strides[i]) * sizeof(T);
    box[i] = static_cast<cuuint32_t>(x.box[i]), steps[i] = 1;
  }
  TensorMap map;
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(&map), type, kRank, const_cast<void*>(x.data), extents,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return map;
  std::string text = "fastattn: the driver refuses a tensor map (CUresult " + std::to_string(static_cast<int>(result)) +
                     "); extent, stride in elements, box:";
  for (int i = 0; i < kRank; ++i) {
    text += " " + std::to_string(x.extents[i]) + ", " + std::to_string(x.strides[i]) + ", " + std::to_string(x.box[i]) +
            (i + 1 < kRank ? ";" : "");
  }
  throw std::runtime_error(text);
}

// A (rows, columns) matrix of T with unit column stride, in boxes of box_rows x box_columns.
template <class T>
TensorMap make_tensor_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows,
                          int box_columns) {
  return make_boxes_map<T>(TensorBoxes<2>{data, {columns, rows}, {1, row_stride}, {box_columns, box_rows}});
}

}  // namespace cuda
}  // namespace fastattn
