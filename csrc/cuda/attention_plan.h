// Which kernels compute a call of attention: questions to its parameters alone.
#pragma once

#include "cuda/attention_decode_parts.cuh"

namespace fastattn {
namespace cuda {

// `refusal`: why none does, or null. Sequences of few rows are the decode kernels', the others those of full tiles,
// which leave the former alone; `fills`: results of rows that no sequence has, or that one of them may leave, are to be
// there before.
struct ForwardPlan {
  const char* refusal;
  bool fills, tiles, decodes;
};

inline ForwardPlan plan_forward(const AttentionParams& p, bool sequences, bool q_packed) {
  const bool dropout = p.dropout.threshold > 0, tiles = dropout || p.rows > kDecodeRows;
  const bool decodes = !dropout && (q_packed || p.rows <= kDecodeRows);
  const char* refusal = nullptr;
  if (p.dtype == DType::kFloat64) refusal = "float64: the CUDA kernels accumulate in float32";
  if (std::max(p.head_dim, p.head_dim_v) > 256) refusal = "head_dim is over 256";
  if (tiles && p.dtype == DType::kFloat32) refusal = "float32 of more than 8 query rows, or with dropout";
  return {refusal, sequences && (tiles || q_packed || p.batch == 0), tiles, decodes};
}

// Why no kernel computes the gradients of a call, or null.
inline const char* backward_refusal(const AttentionParams& p) {
  if (p.dtype == DType::kFloat32 || p.dtype == DType::kFloat64) return "float32 and float64";
  if (std::max(p.head_dim, p.head_dim_v) > 256) return "head_dim over 256";
  return nullptr;
}

}  // namespace cuda
}  // namespace fastattn
