// Small helpers on the GPU that only this host needs.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ringkernels/types.h"

namespace ringplugins {

// Appends the keys and values of new tokens to a cache. Where `token_position` is given, each of these tokens is also
// described as a row of its own: place, slot, and copies of key and value in rows of the query's stride, which the
// attention kernel for one token a row asks for.
struct AppendParams {
  void const* key;           // [B, T, KV, K] dtype
  void const* value;         // [B, T, KV, K]
  void* key_cache;           // [B, KV, S, K]
  void* value_cache;         // [B, KV, S, K]
  int32_t const* position;   // [B] tokens already in the cache
  int32_t const* lengths;    // [B] valid new tokens
  int32_t* token_position;   // [num_tokens] or null; written: place of each token
  int32_t* token_slot;       // [num_tokens] written: its row, -1 for padding
  void* staged_key;          // [num_tokens] rows of staged_stride elements, written
  void* staged_value;        // like staged_key
  int64_t staged_stride;     // elements
  int64_t first_token;       // of the B * T tokens
  int32_t num_tokens;
  int32_t max_length;        // T
  int32_t num_kv_heads;
  int32_t head_dim;
  int64_t capacity;          // S
  int32_t element_bytes;     // of key, value and cache; head_dim * element_bytes is a multiple of 16
};

cudaError_t append(AppendParams const& params, cudaStream_t stream);

}  // namespace ringplugins
