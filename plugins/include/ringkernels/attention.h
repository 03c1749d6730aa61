// Softmax attention over a cache: of one new token per row, split over the context, and of many.
// Contract: RingAttention in ringexport/ops/attention.py.
#pragma once

#include "ringkernels/types.h"

namespace ringkernels {

struct AttentionDecodeParams {
  const void* query;          // [B, H, K] rows of row_stride elements, dtype
  const void* key;            // [B, KV, K] rows of row_stride elements: the new token
  const void* value;          // [B, KV, K] rows of row_stride elements
  const float* query_norm;    // [K] or null: normed and rotated already
  const float* key_norm;      // [K] or null
  const float* rotary_cos;    // [positions, rotary_dim / 2] or null
  const float* rotary_sin;
  void* key_cache;            // [slots, KV, capacity, K] cache_dtype; the new key is written at `position`
  void* value_cache;          // like key_cache
  const float* key_scale;     // [1] or null: real = code * scale, for 8-bit caches
  const float* value_scale;   // [1] or null
  const int32_t* position;    // [B] tokens already in the cache; outside of 0 to capacity - 1: the row is skipped
  const int32_t* slots;       // [B] or null: row b is slot b; < 0: the row is skipped
  void* output;               // [B, H * K] rows of output_row_stride elements, dtype
  void* workspace;            // workspace_bytes(), zeroed once by the owner, for this op alone
  int64_t workspace_bytes;
  int64_t row_stride;
  int64_t output_row_stride;
  int64_t capacity;           // tokens per slot and head
  int64_t max_context;        // upper bound of position + 1 for this launch, <= capacity; sets the split
  int32_t batch;
  int32_t num_heads;          // a multiple of num_kv_heads, at most 16 times as many
  int32_t num_kv_heads;
  int32_t head_dim;           // 64 or 128
  int32_t rotary_dim;
  float softmax_scale;
  float norm_eps;
  DType dtype;                // kBFloat16 or kFloat16
  DType cache_dtype;          // dtype or kFp8E4M3
  int32_t programmatic_launch;
  int32_t cache_settled;      // 1: what wrote slots, position and the cached tokens ended before the kernel
                              // ahead began: they are read while that one still runs
};

// Many new tokens per row, whose keys and values are in the cache already; a token sees itself and all before.
struct AttentionPrefillParams {
  const void* query;          // [N, H, K] rows of row_stride elements, dtype; normed and rotated
  const void* key_cache;      // [slots, KV, capacity, K] dtype
  const void* value_cache;    // like key_cache
  const int32_t* position;    // [B] tokens in the cache before the new ones; < 0: the row is skipped
  const int32_t* slots;       // [B] or null: row b is slot b; < 0: the row is skipped
  const int32_t* starts;      // [B] first token of each row in N, or null: row b starts at b * max_length
  const int32_t* lengths;     // [B] new tokens of each row
  void* output;               // [N, H * K] rows of output_row_stride elements, dtype; padding is not written
  int64_t row_stride;
  int64_t output_row_stride;
  int64_t capacity;           // tokens per slot and head, at least position + lengths
  int32_t batch;
  int32_t max_length;         // upper bound of lengths, known to the host
  int32_t num_heads;          // a multiple of num_kv_heads, at most 16 times as many
  int32_t num_kv_heads;
  int32_t head_dim;           // 64 or 128
  float softmax_scale;        // > 0
  DType dtype;                // kBFloat16 or kFloat16
  int32_t programmatic_launch;
};

Status validate(const AttentionDecodeParams& params);
size_t workspace_bytes(const AttentionDecodeParams& params);
Status launch(const AttentionDecodeParams& params, Stream stream);

Status validate(const AttentionPrefillParams& params);
size_t workspace_bytes(const AttentionPrefillParams& params);
Status launch(const AttentionPrefillParams& params, Stream stream);

}  // namespace ringkernels
