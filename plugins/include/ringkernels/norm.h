// Norms and the work that rides on their memory traffic: residual add, output gate, quantization.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

// residual += delta; y = residual / rms(residual) * weight; y is written as is and/or quantized.
struct RmsNormParams {
  const void* delta;          // [N, D] dtype or null: nothing to add
  void* residual;             // [N, D] residual_dtype, in place when delta is not null
  const float* weight;        // [D]
  void* output;               // [N, D] dtype or null
  void* quantized;            // [N, D] quantized_dtype or null
  float* scale;               // [N] (kChannel) or [N, ceil(D/128)] (kBlock128) fp32, written
  const float* static_scale;  // [1] or null: kTensor, the scale is given
  int32_t rows;               // N
  int32_t columns;            // D, a multiple of 8
  float eps;
  DType dtype;                // kBFloat16 or kFloat16
  DType residual_dtype;       // kFloat32 or dtype
  DType quantized_dtype;      // kFp8E4M3 or kInt8
  ScaleKind scale_kind;       // of `quantized`
  int32_t programmatic_launch;
};

// y = group_rms_norm(x) * weight * sigmoid(gate); y is written as is and/or quantized.
struct GroupNormGateParams {
  const void* input;          // [N, D] rows of input_row_stride elements, dtype
  const void* gate;           // [N, D] rows of gate_row_stride elements, dtype, before the sigmoid
  const float* weight;        // [D]
  void* output;               // [N, D] dtype or null
  void* quantized;            // [N, D] quantized_dtype or null
  float* scale;               // as in RmsNormParams
  const float* static_scale;  // [1] or null
  int64_t input_row_stride;
  int64_t gate_row_stride;
  int32_t rows;
  int32_t columns;            // a multiple of 8 * num_norm_groups
  int32_t num_norm_groups;
  float eps;
  DType dtype;
  DType quantized_dtype;
  ScaleKind scale_kind;
  int32_t programmatic_launch;
};

// Dynamic quantization of rows, or static with a given scale.
struct QuantizeParams {
  const void* input;          // [N, D] rows of input_row_stride elements, dtype
  void* quantized;            // [N, D] quantized_dtype
  float* scale;               // [N] or [N, ceil(D/128)], written unless static_scale is given
  const float* static_scale;  // [1] or null
  int64_t input_row_stride;
  int32_t rows;
  int32_t columns;            // a multiple of 8
  DType dtype;
  DType quantized_dtype;
  ScaleKind scale_kind;
  int32_t programmatic_launch;
};

// RMS norm of every query and key head and rotary embedding, in place or into the KV cache.
struct QkNormRotaryParams {
  void* query;                // [N, H, K] rows of row_stride elements, dtype, in place
  void* key;                  // [N, KV, K] rows of row_stride elements, in place
  const void* value;          // [N, KV, K] rows of row_stride elements, or null: no cache
  const float* query_norm;    // [K]
  const float* key_norm;      // [K]
  const float* rotary_cos;    // [positions, rotary_dim / 2]
  const float* rotary_sin;
  const int32_t* position;    // [N] position of each token; < 0: padding, left alone
  void* key_cache;            // [slots, KV, capacity, K] cache_dtype or null
  void* value_cache;          // like key_cache
  const int32_t* slots;       // [N] cache slot of each token, or null when there is no cache
  const float* key_scale;     // [1] or null: code = real / scale, for 8-bit caches
  const float* value_scale;   // [1] or null
  int64_t row_stride;         // elements, of query, key and value rows
  int64_t capacity;           // tokens per slot and head
  int32_t tokens;             // N
  int32_t num_heads;
  int32_t num_kv_heads;       // equal to num_heads for linear layers
  int32_t head_dim;           // 64 or 128
  int32_t rotary_dim;
  int32_t silu;               // 1: SiLU on query and key first (value is left to its reader)
  float norm_eps;
  DType dtype;
  DType cache_dtype;          // kBFloat16, kFloat16 or kFp8E4M3
  int32_t programmatic_launch;
};

Status validate(const RmsNormParams& params);
size_t workspace_bytes(const RmsNormParams& params);
Status launch(const RmsNormParams& params, Stream stream);

Status validate(const GroupNormGateParams& params);
size_t workspace_bytes(const GroupNormGateParams& params);
Status launch(const GroupNormGateParams& params, Stream stream);

Status validate(const QuantizeParams& params);
size_t workspace_bytes(const QuantizeParams& params);
Status launch(const QuantizeParams& params, Stream stream);

Status validate(const QkNormRotaryParams& params);
size_t workspace_bytes(const QkNormRotaryParams& params);
Status launch(const QkNormRotaryParams& params, Stream stream);

}  // namespace ringkernels
