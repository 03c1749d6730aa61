// Mixture of experts: grouped sigmoid router in fp32, and the routed plus shared SwiGLU experts.
// Contracts: RingRouter and RingExperts in ringexport/ops/moe.py.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

// scores = sigmoid(x W^T); choice by score + bias within the best groups; ties go to the lower id. Every token
// gets top_k different ids: a NaN is chosen last, and makes the weights of its own token NaN if it is chosen.
struct RouterParams {
  const void* hidden;          // [N, D]: normed in hidden_dtype, or the residual if norm_weight is not null
  const float* norm_weight;    // [D] or null
  const float* router_weight;  // [E, D] fp32
  const float* expert_bias;    // [E] fp32
  int32_t* expert_ids;         // [N, top_k] by falling biased score
  float* routing_weights;      // [N, top_k]
  void* workspace;             // workspace_bytes(), zeroed once by the owner, for this op alone
  int64_t workspace_bytes;
  int32_t tokens;              // N
  int32_t hidden_size;         // D, a multiple of 8
  int32_t num_experts;         // E <= 1024, a multiple of n_group
  int32_t top_k;               // <= 32
  int32_t n_group;
  int32_t topk_group;
  int32_t normalize;           // 1: divide by the sum of the chosen scores
  float routed_scaling_factor;
  float norm_eps;
  DType hidden_dtype;          // kBFloat16, kFloat16 or kFloat32
  int32_t programmatic_launch;
};

// output = sum over the token's experts of routing_weight * down(silu(gate) * up), plus the shared expert.
// 8-bit weights: the input of each product is quantized per token (kChannel) or per 128 channels (kBlock128),
// or with static scales (kTensor).
struct ExpertsParams {
  const void* hidden;            // [N, D] normed, dtype; or the residual in fp32 if norm_weight is not null
  const float* norm_weight;      // [D] or null; norm inside, small N only
  const void* quantized_hidden;  // [N, D] weight_dtype or null: quantized here
  const float* hidden_scale;     // of quantized_hidden
  const float* gate_up_input_scale;  // [1] static, or null: dynamic
  const float* down_input_scale;     // [1] static, or null: dynamic
  const int32_t* expert_ids;     // [N, top_k]; < 0 or >= num_experts: this choice adds nothing
  const float* routing_weights;  // [N, top_k]
  const void* gate_up_proj;      // [E, 2 I, D] weight_dtype, rows alternate gate, up
  const float* gate_up_scale;    // [E, 2 I], [E] (kTensor) or [E, 2, ceil(I/128), ceil(D/128)]: gate, up blocks
  const void* down_proj;         // [E, D, I]
  const float* down_scale;       // [E, D], [E] or [E, ceil(D/128), ceil(I/128)]
  const void* shared_gate_up;    // [2 J, D] rows alternate gate, up, or null: no shared expert
  const float* shared_gate_up_scale;
  const void* shared_down;       // [D, J]
  const float* shared_down_scale;
  void* output;                  // [N, D] output_dtype
  void* workspace;               // workspace_bytes(), zeroed once by the owner, for this op alone
  int64_t workspace_bytes;
  int32_t tokens;                // N
  int32_t hidden_size;           // D, a multiple of 128
  int32_t intermediate_size;     // I, a multiple of 32
  int32_t shared_intermediate_size;  // J, or 0
  int32_t num_experts;
  int32_t top_k;
  float norm_eps;
  DType dtype;                   // kBFloat16 or kFloat16: activations
  DType weight_dtype;            // dtype, kFp8E4M3 or kInt8; of the shared expert too
  DType output_dtype;            // dtype or kFloat32
  ScaleKind scale_kind;          // of weights: kNone, kChannel, kTensor or kBlock128
  int32_t accumulate;            // 1: output += (kFloat32: the residual)
  int32_t programmatic_launch;
};

Status validate(const RouterParams& params);
size_t workspace_bytes(const RouterParams& params);
// Enough for every call with at most this many tokens: fewer may be split into more parts.
size_t max_workspace_bytes(const RouterParams& params);
Status launch(const RouterParams& params, Stream stream);

Status validate(const ExpertsParams& params);
size_t workspace_bytes(const ExpertsParams& params);
// How much of the workspace, from its start, has to be zero: less than all of it for many tokens.
size_t zeroed_workspace_bytes(const ExpertsParams& params);
Status launch(const ExpertsParams& params, Stream stream);

}  // namespace ringkernels
