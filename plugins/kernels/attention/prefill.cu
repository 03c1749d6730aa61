// Checks and dispatch of the prefill attention.
#include "attention/prefill.cuh"
#include "attention/prefill_hopper.cuh"
#include "common/check.h"

namespace ringkernels {
namespace {

using Kernel = void (*)(AttentionPrefillParams);

Status launch_kernel_of(Kernel kernel, int threads, size_t shared_bytes, const AttentionPrefillParams& p,
                        Stream stream) {
  const int tile_tokens = attention::kQueryRows / (p.num_heads / p.num_kv_heads);
  LaunchShape shape;
  shape.grid = dim3((p.max_length + tile_tokens - 1) / tile_tokens, p.num_kv_heads, p.batch);
  shape.block = dim3(threads);
  shape.shared_bytes = shared_bytes;
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  return launch_kernel(kernel, shape, p);
}

Status is_hopper(bool* hopper) {
  int device = 0, major = 0;
  RING_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device)));
  RING_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  *hopper = major == 9 && !kPortableOnly;
  return Status{};
}

template <typename T>
Status launch_prefill(const AttentionPrefillParams& p, Stream stream) {
  bool hopper = false;
  RING_RETURN_IF_ERROR(is_hopper(&hopper));
  if (hopper && p.head_dim == attention::hopper::kDim) {
    return launch_kernel_of(attention::hopper::prefill_kernel<T>, attention::hopper::kThreads,
                            attention::hopper::kSharedBytes, p, stream);
  }
  return p.head_dim == 64 ? launch_kernel_of(attention::prefill_kernel<T, 64>, attention::kPrefillThreads,
                                             attention::prefill_shared_bytes<64>(), p, stream)
                          : launch_kernel_of(attention::prefill_kernel<T, 128>, attention::kPrefillThreads,
                                             attention::prefill_shared_bytes<128>(), p, stream);
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
