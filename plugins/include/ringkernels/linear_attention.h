// Linear attention with one decay per head: S_t = exp(log_decay) S_(t-1) + k_t v_t^T, o_t = query_scale q_t S_t.
// Contract: RingLinearAttention in ringexport/ops/linear_attention.py.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

// One token per row; the state is updated in place. Optionally SiLU, RMS norm per head and rotary embedding of
// query and key are done on the way (query_norm, key_norm and rotary tables not null).
struct LinearAttentionDecodeParams {
  const void* query;          // [B, H, K] rows of row_stride elements, dtype
  const void* key;            // [B, H, K] like query
  const void* value;          // [B, H, K] like query (value dim == key dim)
  const float* query_norm;    // [K] or null: query is already normed
  const float* key_norm;      // [K] or null
  const float* rotary_cos;    // [positions, rotary_dim / 2] or null: already rotated
  const float* rotary_sin;    // [positions, rotary_dim / 2] or null
  const int32_t* position;    // [B] position of the token; needed with rotary tables
  const float* log_decay;     // [H], <= 0
  float* state;               // [slots, H, K, K(value)] fp32, in place
  const int32_t* slots;       // [B] state slot of each row, < 0: the row is skipped; null: row b is slot b
  void* output;               // [B, H * K] rows of output_row_stride elements, dtype
  int64_t row_stride;         // elements
  int64_t output_row_stride;  // elements
  int32_t batch;
  int32_t num_heads;
  int32_t head_dim;           // 64 or 128
  int32_t rotary_dim;         // rotated dimensions of each head, even
  int32_t silu;               // 1: SiLU on query, key and value first
  float query_scale;
  float norm_eps;
  DType dtype;                // kBFloat16, kFloat16 or kFloat32
  int32_t programmatic_launch;  // 1: wait for the kernel before with griddepcontrol
  int32_t state_settled;      // 1: what wrote state, slots and position ended before the kernel ahead began:
                              // they are read while that one still runs
};

// Many tokens per row, in chunks; the state is carried in and out in place. Query and key are normed and rotated.
struct LinearAttentionPrefillParams {
  const void* query;          // [N, H, K] rows of row_stride elements, dtype
  const void* key;            // like query
  const void* value;          // like query
  const float* log_decay;     // [H], <= 0
  float* state;               // [slots, H, K, K] fp32, in place
  const int32_t* slots;       // [B] or null: row b is slot b; < 0: the row is skipped
  const int32_t* starts;      // [B] first token of each row in N, or null: row b starts at b * max_length
  const int32_t* lengths;     // [B] tokens of each row, 0 leaves state and output alone
  const int32_t* reset;       // [B] or null; not 0: start from a zero state, whatever `state` holds
  void* output;               // [N, H * K] rows of output_row_stride elements, dtype; padding is not written
  void* workspace;            // workspace_bytes() bytes, 16-byte aligned
  int64_t workspace_bytes;
  int64_t row_stride;
  int64_t output_row_stride;
  int32_t batch;
  int32_t max_length;         // upper bound of lengths, known to the host
  int32_t num_heads;
  int32_t head_dim;           // 64 or 128
  float query_scale;
  DType dtype;                // kBFloat16, kFloat16
  int32_t programmatic_launch;
};

Status validate(const LinearAttentionDecodeParams& params);
size_t workspace_bytes(const LinearAttentionDecodeParams& params);
Status launch(const LinearAttentionDecodeParams& params, Stream stream);

Status validate(const LinearAttentionPrefillParams& params);
size_t workspace_bytes(const LinearAttentionPrefillParams& params);
// Enough for every call with at most this batch and max_length: fewer rows are cut into more segments.
size_t max_workspace_bytes(const LinearAttentionPrefillParams& params);
Status launch(const LinearAttentionPrefillParams& params, Stream stream);

}  // namespace ringkernels
