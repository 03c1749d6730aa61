// validate, workspace_bytes and launch of ExpertsParams: which path serves how many tokens.
#include "common/check.h"
#include "moe/experts_paths.h"
#include "moe/experts_sorted.cuh"
#include "moe/grouped_experts.h"

namespace ringkernels {
namespace moe {
namespace {

constexpr int kCombineAhead = 9;  // results that are on their way at once: 8 experts and the shared one

// grid: (tokens, parts of D). Each thread: 4 channels of one token, its choices added in order.
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan) {
  const int choices = choices_of(p), token = blockIdx.x, lane = threadIdx.x % 32;
  const int channel = (blockIdx.y * kThreads + threadIdx.x) * 4;
  const bool inside = channel < p.hidden_size;
  // The inputs of the op were there before its first kernel let the others start: no need to wait for them.
  float weight_of_lane = 0.0f;
  bool here = false;
  if (lane < p.top_k) {
    const int64_t index = (int64_t)token * p.top_k + lane;
    const int expert = __ldcg(p.expert_ids + index);
    here = expert >= 0 && expert < p.num_experts;
    if (here) weight_of_lane = __ldcg(p.routing_weights + index);
  }
  const unsigned used = __ballot_sync(kFullWarp, here);
  const int64_t first = (int64_t)token * p.hidden_size + channel;
  float sum[4] = {}, before[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) before[i] = inside ? output_before(p, first + i) : 0.0f;
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int base = 0; base < choices; base += kCombineAhead) {
    float4 y[kCombineAhead];
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      const int choice = base + i;
      const bool wanted = inside && choice < choices && (choice == p.top_k || (used >> choice & 1));
      const float* result = plan.results + ((int64_t)token * choices + choice) * p.hidden_size + channel;
      y[i] = wanted ? __ldcg(reinterpret_cast<const float4*>(result)) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kCombineAhead; ++i) {
      const int choice = base + i;
      const float of_lane = __shfl_sync(kFullWarp, weight_of_lane, choice % 32);
      const float weight = choice == p.top_k ? 1.0f : of_lane;
      sum[0] += weight * y[i].x, sum[1] += weight * y[i].y, sum[2] += weight * y[i].z,
          sum[3] += weight * y[i].w;
    }
  }
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) put_output(p, first + i, before[i] + sum[i]);
}

constexpr int kMaxSortedTokens = 512;  // above, the grouped path is faster where it serves the case
constexpr int kDirectTokens = 8;
constexpr int kDirectPairs = 16;
constexpr int kOneTileTokens = 128;  // above, experts often have more than 8 tokens

// Measured: with more pairs, sorting them first is faster. A dense layer, one expert, has one pair per token.
bool direct(const ExpertsParams& p) {
  return p.tokens <= kDirectTokens && p.tokens * p.top_k <= kDirectPairs;
}

bool grouped(const ExpertsParams& p) { return p.tokens > kMaxSortedTokens && grouped_experts_supports(p); }

}  // namespace

size_t shared_limit() {
  int device = 0, bytes = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && shared_bytes_per_block(device, &bytes) == cudaSuccess;
  return known ? (size_t)bytes : 99 * 1024;
}

ExpertsPlan plan_experts(const ExpertsParams& p, bool sorted) {
  ExpertsPlan plan = {};
  const int width = widest(p);
  const int64_t routed = (int64_t)p.tokens * p.top_k, pairs = (int64_t)p.tokens * choices_of(p);
  uint8_t* base = static_cast<uint8_t*>(p.workspace);
  plan.bytes = kGroupedCounterBytes;
  auto take = [&](size_t bytes) {
    uint8_t* start = base + plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return start;
  };
  const size_t element = p.weight_dtype == DType::kInt8 ? 1 : 2;  // of prepared rows
  plan.codes = take((size_t)p.tokens * p.hidden_size * element);
  plan.code_scales =
      reinterpret_cast<float*>(take((size_t)p.tokens * blocks_of(p.hidden_size) * sizeof(float)));
  plan.intermediate = reinterpret_cast<float*>(take((size_t)pairs * width * sizeof(float)));
  if (sorted) {
    plan.tokens_per_group = kTokenTile;
    if (p.tokens > kOneTileTokens && (size_t)most_stage_bytes(p, 2) + kLeastRingBytes <= shared_limit()) {
      plan.tokens_per_group = 2 * kTokenTile;
    }
    plan.results = reinterpret_cast<float*>(take((size_t)pairs * p.hidden_size * sizeof(float)));
    // Every expert has at most one group that is not full.
    const int64_t most =
        routed / kTokenTile + (routed < p.num_experts ? routed : p.num_experts) + p.tokens / kTokenTile + 1;
    plan.groups = reinterpret_cast<Group*>(take(most * sizeof(Group)));
    plan.pairs = reinterpret_cast<int*>(take(pairs * sizeof(int)));
    plan.group_count = reinterpret_cast<int*>(take(sizeof(int)));
  } else {
    const int padded = (width + kSegmentBytes - 1) / kSegmentBytes * kSegmentBytes;
    plan.intermediate_codes = take((size_t)pairs * padded * element);
    plan.intermediate_scales =
        reinterpret_cast<float*>(take((size_t)pairs * blocks_of(width) * sizeof(float)));
  }
  const bool as_given = p.weight_dtype == DType::kInt8 ? p.quantized_hidden != nullptr
                                                       : !is_8bit(p.weight_dtype) && p.norm_weight == nullptr;
  if (as_given) plan.codes = nullptr;
  return plan;
}

Status launch_combine(const ExpertsParams& p, const ExpertsPlan& plan, Stream stream) {
  LaunchShape shape;
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  shape.grid = dim3(p.tokens, (p.hidden_size + kThreads * 4 - 1) / (kThreads * 4));
  shape.block = dim3(kThreads);
  return launch_kernel(combine_kernel, shape, p, plan);
}

namespace {

template <typename Format>
Status launch_format(const ExpertsParams& p, Stream stream) {
  return direct(p) ? ExpertsPath<Format>::launch_direct(p, stream)
                   : ExpertsPath<Format>::launch_sorted(p, stream);
}

Status validate_shape(const ExpertsParams& p) {
  RING_REQUIRE(p.tokens >= 0, kBadShape, "tokens", "0 or more", p.tokens);
  RING_REQUIRE(p.hidden_size > 0 && p.hidden_size % 128 == 0, kBadShape, "hidden_size", "a multiple of 128",
               p.hidden_size);
  RING_REQUIRE(p.intermediate_size > 0 && p.intermediate_size % 32 == 0, kBadShape, "intermediate_size",
               "a multiple of 32", p.intermediate_size);
  RING_REQUIRE(p.shared_intermediate_size >= 0 && p.shared_intermediate_size % 32 == 0, kBadShape,
               "shared_intermediate_size", "a multiple of 32, or 0", p.shared_intermediate_size);
  RING_REQUIRE(p.num_experts > 0 && p.num_experts <= kMaxSortedExperts, kBadShape, "num_experts", "1 to 1024",
               p.num_experts);
  RING_REQUIRE(p.top_k > 0 && p.top_k <= 32, kBadShape, "top_k", "1 to 32", p.top_k);
  return Status{};
}

Status validate_types(const ExpertsParams& p) {
  RING_REQUIRE(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kBadType, "dtype", "bf16 or fp16",
               p.dtype);
  RING_REQUIRE(p.weight_dtype == p.dtype || is_8bit(p.weight_dtype), kBadType, "weight_dtype",
               "dtype, FP8 E4M3 or INT8", p.weight_dtype);
  RING_REQUIRE(p.output_dtype == p.dtype || p.output_dtype == DType::kFloat32, kBadType, "output_dtype",
               "dtype or fp32", p.output_dtype);
  const bool none = p.scale_kind == ScaleKind::kNone;
  const bool known = none || p.scale_kind == ScaleKind::kTensor || p.scale_kind == ScaleKind::kChannel ||
                     p.scale_kind == ScaleKind::kBlock128;
  RING_REQUIRE(known && none != is_8bit(p.weight_dtype), kBadType, "scale_kind",
               "none for dtype weights, tensor, channel or block for 8 bits", p.scale_kind);
  RING_REQUIRE(p.quantized_hidden == nullptr || is_8bit(p.weight_dtype), kBadType, "quantized_hidden",
               "null for weights that are not quantized", 1);
  return Status{};
}

Status validate_pointers(const ExpertsParams& p) {
  if (p.quantized_hidden == nullptr) RING_REQUIRE_POINTER(p, hidden);
  RING_REQUIRE_ALIGNED(p, hidden);
  RING_REQUIRE_ALIGNED(p, norm_weight);
  RING_REQUIRE_ALIGNED(p, quantized_hidden);
  if (p.quantized_hidden != nullptr && p.gate_up_input_scale == nullptr)
    RING_REQUIRE_POINTER(p, hidden_scale);
  RING_REQUIRE_POINTER(p, expert_ids);
  RING_REQUIRE_POINTER(p, routing_weights);
  RING_REQUIRE_POINTER(p, gate_up_proj);
  RING_REQUIRE_ALIGNED(p, gate_up_proj);
  RING_REQUIRE_POINTER(p, down_proj);
  RING_REQUIRE_ALIGNED(p, down_proj);
  const bool scaled = p.scale_kind != ScaleKind::kNone;
  if (scaled) RING_REQUIRE_POINTER(p, gate_up_scale);
  if (scaled) RING_REQUIRE_POINTER(p, down_scale);
  if (has_shared(p)) {
    RING_REQUIRE_POINTER(p, shared_gate_up);
    RING_REQUIRE_ALIGNED(p, shared_gate_up);
    RING_REQUIRE_POINTER(p, shared_down);
    RING_REQUIRE_ALIGNED(p, shared_down);
    if (scaled) RING_REQUIRE_POINTER(p, shared_gate_up_scale);
    if (scaled) RING_REQUIRE_POINTER(p, shared_down_scale);
  }
  RING_REQUIRE_POINTER(p, output);
  RING_REQUIRE_ALIGNED(p, output);
  RING_REQUIRE_POINTER(p, workspace);
  RING_REQUIRE_ALIGNED(p, workspace);
  return Status{};
}

}  // namespace
}  // namespace moe

size_t workspace_bytes(const ExpertsParams& p) {
  if (p.tokens <= 0 || p.hidden_size <= 0 || p.top_k <= 0) return 0;
  if (moe::grouped(p)) return grouped_experts_workspace_bytes(p);
  return moe::plan_experts(p, !moe::direct(p)).bytes;
}

size_t zeroed_workspace_bytes(const ExpertsParams& p) {
  return moe::grouped(p) ? grouped_experts_zeroed_bytes(p) : workspace_bytes(p);
}

Status validate(const ExpertsParams& p) {
  RING_RETURN_IF_ERROR(moe::validate_shape(p));
  RING_RETURN_IF_ERROR(moe::validate_types(p));
  if (p.tokens == 0) return Status{};
  RING_RETURN_IF_ERROR(moe::validate_pointers(p));
  RING_REQUIRE(p.workspace_bytes >= (int64_t)workspace_bytes(p), kWorkspace, "workspace_bytes",
               "at least workspace_bytes()", p.workspace_bytes);
  if (!moe::grouped(p) && !moe::direct(p)) {
    RING_REQUIRE((size_t)moe::most_stage_bytes(p, 1) + moe::kLeastRingBytes <= moe::shared_limit(),
                 kUnsupported, "intermediate_size", "one whose tokens fit shared memory",
                 p.intermediate_size);
  }
  return Status{};
}

Status launch(const ExpertsParams& p, Stream stream) {
  RING_RETURN_IF_ERROR(validate(p));
  if (p.tokens == 0) return Status{};
  if (moe::grouped(p)) return launch_grouped_experts(p, stream);
  switch (p.weight_dtype) {
    case DType::kFp8E4M3: return moe::launch_format<moe::Fp8Weights>(p, stream);
    case DType::kInt8: return moe::launch_format<moe::Int8Weights>(p, stream);
    case DType::kBFloat16: return moe::launch_format<moe::PlainWeights<__nv_bfloat16>>(p, stream);
    default: return moe::launch_format<moe::PlainWeights<__half>>(p, stream);
  }
}

}  // namespace ringkernels
