// Matrix product y = x W^T. Up to 64 rows it is memory bound: every weight byte is read once, and the norm
// before it can be computed inside, once per block, so that no kernel of its own is needed. More rows are
// multiplied in large tiles, with fewer choices: no prologue, no static or block scales, 16-bit output in
// contiguous rows.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

enum class Prologue : int32_t {
  kNone = 0,           // input is used as it is: quantized codes, or dtype (quantized here if weights are 8 bit)
  kRmsNorm = 1,        // input is the residual [M, K] in residual_dtype
  kGroupNormGate = 2,  // input is the attention output, gate the output gate before its sigmoid
};

struct ProjectionParams {
  const void* input;           // [M, K] rows of input_row_stride elements: see Prologue
  const float* input_scale;    // of quantized input: [M] or [M, ceil(K/128)]; null: input is not quantized
  const float* static_scale;   // [1] or null: the scale for quantizing the input here (per tensor)
  const void* gate;            // [M, K] rows of gate_row_stride elements, for kGroupNormGate
  const float* norm_weight;    // [K] for both norms
  const void* weight;          // [N, K] weight_dtype, contiguous
  const float* weight_scale;   // [N] (kChannel), [1] (kTensor), [ceil(N/128), ceil(K/128)] (kBlock128) or null
  void* output;                // [M, N] rows of output_row_stride elements, output_dtype
  void* workspace;             // workspace_bytes() bytes or null if 0; zeroed once by the owner, for this op alone
  int64_t workspace_bytes;
  int64_t input_row_stride;
  int64_t gate_row_stride;
  int64_t output_row_stride;
  int32_t m;                   // 1 or more
  int32_t n;                   // a multiple of 16
  int32_t k;                   // a multiple of 64
  int32_t num_norm_groups;
  float norm_eps;
  Prologue prologue;
  DType input_dtype;           // kBFloat16, kFloat16, kFloat32 (residual), kFp8E4M3 or kInt8
  DType weight_dtype;          // kBFloat16, kFloat16, kFp8E4M3 or kInt8
  DType output_dtype;          // kBFloat16, kFloat16 or kFloat32
  ScaleKind weight_scale_kind;
  int32_t accumulate;          // 1: output += y (output_dtype kFloat32: the residual)
  int32_t programmatic_launch;
};

Status validate(const ProjectionParams& params);
size_t workspace_bytes(const ProjectionParams& params);
Status launch(const ProjectionParams& params, Stream stream);

}  // namespace ringkernels
