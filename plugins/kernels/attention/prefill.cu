// Checks and dispatch of the prefill attention.
#include "attention/prefill.cuh"

#include "common/check.h"

namespace ringkernels {
namespace {

template <typename T, int kDim>
Status launch_prefill(const AttentionPrefillParams& p, Stream stream) {
  const int tile_tokens = attention::kQueryRows / (p.num_heads / p.num_kv_heads);
  LaunchShape shape;
  shape.grid = dim3((p.max_length + tile_tokens - 1) / tile_tokens, p.num_kv_heads, p.batch);
  shape.block = dim3(attention::kPrefillThreads);
  shape.shared_bytes = attention::prefill_shared_bytes<kDim>();
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  return launch_kernel(attention::prefill_kernel<T, kDim>, shape, p);
}

template <typename T>
Status launch_prefill(const AttentionPrefillParams& p, Stream stream) {
  return p.head_dim == 64 ? launch_prefill<T, 64>(p, stream) : launch_prefill<T, 128>(p, stream);
}

}  // namespace

Status validate(const AttentionPrefillParams& p) {
  RING_REQUIRE(p.batch >= 0 && p.batch <= 65535, kBadShape, "batch", "0 to 65535", p.batch);
  RING_REQUIRE(p.max_length >= 0 && p.max_length <= 1 << 30, kBadShape, "max_length", "0 to 2^30",
               p.max_length);
  RING_REQUIRE(p.head_dim == 64 || p.head_dim == 128, kBadShape, "head_dim", "64 or 128", p.head_dim);
  RING_REQUIRE(p.num_kv_heads > 0 && p.num_kv_heads <= 65535, kBadShape, "num_kv_heads", "1 to 65535",
               p.num_kv_heads);
  RING_REQUIRE(p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 && p.num_heads / p.num_kv_heads <= 16,
               kBadShape, "num_heads", "a multiple of num_kv_heads, at most 16 times as many", p.num_heads);
  RING_REQUIRE(p.capacity > 0 && p.capacity <= INT32_MAX, kBadShape, "capacity", "1 to 2^31 - 1", p.capacity);
  RING_REQUIRE(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kBadType, "dtype",
               "kBFloat16 or kFloat16", p.dtype);
  RING_REQUIRE(p.softmax_scale > 0.0f, kBadShape, "softmax_scale", "a positive number", p.softmax_scale);
  const int64_t width = static_cast<int64_t>(p.num_heads) * p.head_dim;
  RING_REQUIRE(p.row_stride >= width, kBadShape, "row_stride", "at least num_heads * head_dim", p.row_stride);
  RING_REQUIRE(p.row_stride % 8 == 0, kMisaligned, "row_stride", "a multiple of 8", p.row_stride);
  RING_REQUIRE(p.output_row_stride >= width, kBadShape, "output_row_stride", "at least num_heads * head_dim",
               p.output_row_stride);
  RING_REQUIRE(p.output_row_stride % 8 == 0, kMisaligned, "output_row_stride", "a multiple of 8",
               p.output_row_stride);
  if (p.batch == 0 || p.max_length == 0) return Status{};
  RING_REQUIRE_POINTER(p, query);
  RING_REQUIRE_POINTER(p, key_cache);
  RING_REQUIRE_POINTER(p, value_cache);
  RING_REQUIRE_POINTER(p, position);
  RING_REQUIRE_POINTER(p, lengths);
  RING_REQUIRE_POINTER(p, output);
  RING_REQUIRE_ALIGNED(p, query);
  RING_REQUIRE_ALIGNED(p, key_cache);
  RING_REQUIRE_ALIGNED(p, value_cache);
  RING_REQUIRE_ALIGNED(p, output);
  return Status{};
}

size_t workspace_bytes(const AttentionPrefillParams& /*p*/) { return 0; }

Status launch(const AttentionPrefillParams& p, Stream stream) {
  RING_RETURN_IF_ERROR(validate(p));
  if (p.batch == 0 || p.max_length == 0) return Status{};
  return p.dtype == DType::kFloat16 ? launch_prefill<__half>(p, stream)
                                    : launch_prefill<__nv_bfloat16>(p, stream);
}

}  // namespace ringkernels
