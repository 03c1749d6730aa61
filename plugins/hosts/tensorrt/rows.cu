#include "rows.h"

namespace ringplugins {

namespace {

constexpr int32_t kThreads = 128;

// One block per token; vectors of 16 bytes.
__global__ void append_kernel(AppendParams p) {
  int32_t const index = blockIdx.x;
  int64_t const token = p.first_token + index;
  int64_t const row = token / p.max_length;
  int32_t const step = static_cast<int32_t>(token % p.max_length);
  int64_t const place = static_cast<int64_t>(p.position[row]) + step;
  bool const used = step < p.lengths[row] && place >= 0 && place < p.capacity;
  bool const staged_too = p.token_position != nullptr;
  if (staged_too && threadIdx.x == 0) {
    p.token_position[index] = static_cast<int32_t>(place);
    p.token_slot[index] = used ? static_cast<int32_t>(row) : -1;
  }
  if (!used) {
    return;
  }
  int32_t const per_head = p.head_dim * p.element_bytes / static_cast<int32_t>(sizeof(uint4));
  int32_t const vectors = p.num_kv_heads * per_head;
  int64_t const staged = index * (p.staged_stride * p.element_bytes / static_cast<int64_t>(sizeof(uint4)));
  auto const* key = static_cast<uint4 const*>(p.key) + token * vectors;
  auto const* value = static_cast<uint4 const*>(p.value) + token * vectors;
  auto* key_cache = static_cast<uint4*>(p.key_cache);
  auto* value_cache = static_cast<uint4*>(p.value_cache);
  for (int32_t i = threadIdx.x; i < vectors; i += blockDim.x) {
    int64_t const head = row * p.num_kv_heads + i / per_head;
    int64_t const target = (head * p.capacity + place) * per_head + i % per_head;
    key_cache[target] = key[i];
    value_cache[target] = value[i];
    if (staged_too) {
      static_cast<uint4*>(p.staged_key)[staged + i] = key[i];
      static_cast<uint4*>(p.staged_value)[staged + i] = value[i];
    }
  }
}

}  // namespace

cudaError_t append(AppendParams const& params, cudaStream_t stream) {
  append_kernel<<<static_cast<unsigned>(params.num_tokens), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace ringplugins
