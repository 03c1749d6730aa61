// Checks, plan and dispatch of the linear-attention prefill.
#include "linear_attention/prefill.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/check.h"
#include "common/launch.cuh"

namespace ringkernels {
namespace linear_attention {
namespace {

constexpr int64_t kChunkTokens = 64;
constexpr int64_t kMinSegmentTokens = 4 * kChunkTokens;  // below, the state costs more than it saves

int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

PrefillPlan plan_prefill(const LinearAttentionPrefillParams& params, bool hopper) {
  const int64_t heads = std::max<int64_t>(1, (int64_t)params.batch * params.num_heads);
  const int64_t wanted = std::max<int64_t>(1, (hopper ? kMaxHopperShares : kMaxPortableShares) / heads);
  const int64_t length = std::max<int64_t>(1, params.max_length);
  const int64_t each = std::max(kMinSegmentTokens, divide_up(length, wanted));
  const int64_t segment_tokens = divide_up(each, kChunkTokens) * kChunkTokens;
  return PrefillPlan{(int32_t)divide_up(length, segment_tokens), (int32_t)segment_tokens, hopper, 0, 0, 0};
}

// States in the workspace: at the start of every segment, and what every run adds.
int64_t packed_states(const PrefillPlan& plan, int64_t heads) {
  if (plan.segments == 1 || heads == 0) return 0;
  return heads * (2 * plan.segments - 1) + (plan.hopper ? kMaxHopperShares : kMaxPortableShares);
}

struct Device {
  int major = 0, minor = 0, shared_bytes = 0, sm_shared_bytes = 0, sms = 0;
};

cudaError_t find_device(Device& device) {
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
  cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.sm_shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  return shared_bytes_per_block(index, &device.shared_bytes);
}

}  // namespace
}  // namespace linear_attention

Status validate(const LinearAttentionPrefillParams& params) {
  RING_REQUIRE(params.dtype == DType::kBFloat16 || params.dtype == DType::kFloat16, kBadType, "dtype",
               "bf16 or fp16", params.dtype);
  RING_REQUIRE(params.head_dim == 64 || params.head_dim == 128, kBadShape, "head_dim", "64 or 128",
               params.head_dim);
  RING_REQUIRE(params.batch >= 0 && params.batch <= 65535, kBadShape, "batch", "0 to 65535", params.batch);
  RING_REQUIRE(params.num_heads > 0 && params.num_heads <= 65535, kBadShape, "num_heads", "1 to 65535",
               params.num_heads);
  RING_REQUIRE(params.max_length >= 0 && params.max_length <= 1 << 30, kBadShape, "max_length", "0 to 2^30",
               params.max_length);
  const int64_t width = (int64_t)params.num_heads * params.head_dim;
  RING_REQUIRE(params.row_stride >= width, kBadShape, "row_stride", "at least num_heads * head_dim",
               params.row_stride);
  RING_REQUIRE(params.output_row_stride >= width, kBadShape, "output_row_stride",
               "at least num_heads * head_dim", params.output_row_stride);
  RING_REQUIRE(params.row_stride % 8 == 0, kMisaligned, "row_stride", "rows of whole 16 bytes",
               params.row_stride);
  RING_REQUIRE(params.output_row_stride % 8 == 0, kMisaligned, "output_row_stride", "rows of whole 16 bytes",
               params.output_row_stride);
  if (params.batch == 0 || params.max_length == 0) return Status{};
  RING_REQUIRE_POINTER(params, query);
  RING_REQUIRE_POINTER(params, key);
  RING_REQUIRE_POINTER(params, value);
  RING_REQUIRE_POINTER(params, log_decay);
  RING_REQUIRE_POINTER(params, state);
  RING_REQUIRE_POINTER(params, lengths);
  RING_REQUIRE_POINTER(params, output);
  RING_REQUIRE_ALIGNED(params, query);
  RING_REQUIRE_ALIGNED(params, key);
  RING_REQUIRE_ALIGNED(params, value);
  RING_REQUIRE_ALIGNED(params, state);
  RING_REQUIRE_ALIGNED(params, output);
  const int64_t needed = (int64_t)workspace_bytes(params);
  if (needed == 0) return Status{};
  RING_REQUIRE_POINTER(params, workspace);
  RING_REQUIRE_ALIGNED(params, workspace);
  RING_REQUIRE(params.workspace_bytes >= needed, kWorkspace, "workspace_bytes", "at least workspace_bytes()",
               params.workspace_bytes);
  return Status{};
}

size_t workspace_bytes(const LinearAttentionPrefillParams& params) {
  // Enough for either plan: an engine may be sized on another machine than it runs on.
  const int64_t heads = std::max<int64_t>(0, (int64_t)params.batch * params.num_heads);
  const int64_t states =
      std::max(linear_attention::packed_states(linear_attention::plan_prefill(params, false), heads),
               linear_attention::packed_states(linear_attention::plan_prefill(params, true), heads));
  return (size_t)(states * params.head_dim * params.head_dim) * sizeof(float);
}

size_t max_workspace_bytes(const LinearAttentionPrefillParams& params) {
  using namespace linear_attention;
  if (params.max_length <= kMinSegmentTokens) return 0;
  // heads * segments is at most the number of shares.
  return (size_t)(3 * kMaxPortableShares * params.head_dim * params.head_dim) * sizeof(float);
}

Status launch(const LinearAttentionPrefillParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  if (params.batch == 0 || params.max_length == 0) return Status{};
  linear_attention::Device device;
  RING_RETURN_IF_ERROR(cuda_status(linear_attention::find_device(device)));
  const bool hopper = !kPortableOnly && params.head_dim == 128 && device.major == 9 && device.minor == 0;
  auto plan = linear_attention::plan_prefill(params, hopper);
  plan.shared_bytes = device.shared_bytes;
  plan.sm_shared_bytes = device.sm_shared_bytes;
  plan.sms = device.sms;
  return params.dtype == DType::kBFloat16
             ? linear_attention::launch_prefill<__nv_bfloat16>(params, plan, stream)
             : linear_attention::launch_prefill<__half>(params, plan, stream);
}

}  // namespace ringkernels
