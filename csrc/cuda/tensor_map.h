// TMA's view of a matrix, from the driver's function looked up at run time.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace fastattn {
namespace cuda {

// A (rows, columns) matrix of T with unit column stride, in boxes of box_rows x box_columns, their rows of 128 bytes
// swizzled; what lies outside reads as zero. `data` and the row stride are multiples of 16 bytes, no extent is 0.
template <class T>
TensorMap make_tensor_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows,
                          int box_columns) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  static const auto encode =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function("cuTensorMapEncodeTiled", 12000));
  const CUtensorMapDataType type =
      std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const cuuint64_t extents[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * sizeof(T)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  TensorMap map;
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(&map), type, 2, const_cast<void*>(data), extents,
                                 strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("fastattn: the driver refuses a tensor map of " + std::to_string(rows) + " x " +
                             std::to_string(columns) + " elements, rows " + std::to_string(row_stride) +
                             " apart, in boxes of " + std::to_string(box_rows) + " x " + std::to_string(box_columns) +
                             " (CUresult " + std::to_string(static_cast<int>(result)) + ")");
  }
  return map;
}

}  // namespace cuda
}  // namespace fastattn
