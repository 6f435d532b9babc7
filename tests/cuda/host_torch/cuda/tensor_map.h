// csrc/cuda/tensor_map.h in the host model.
#pragma once

#include "host_ptx_sm90.h"

namespace fastattn {
namespace cuda {

template <class T>
TensorMap make_tensor_map(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int box_rows,
                          int box_columns) {
  return matrix_map(data, rows, columns, row_stride, box_rows, box_columns);
}

}  // namespace cuda
}  // namespace fastattn
