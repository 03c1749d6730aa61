// Checks, the plan of a launch, and the choice of an instantiation.
#include "common/check.h"
#include "projection/hopper.h"
#include "projection/hopper_row.h"
#include "projection/kernel.cuh"
#include "projection/large.h"
#include "ringkernels/projection.h"

namespace ringkernels {
namespace {

constexpr int kMaxTokens = kMaxSmallRows;

bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

int min(int a, int b) { return a < b ? a : b; }

int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Fills the parts of a plan that follow from its shape and split. False if the shared memory cannot hold it.
bool fill_plan(const ProjectionParams& params, const DeviceLimits& limits, int depth, ProjectionPlan* plan) {
  const KernelShape& shape = kKernelShapes[plan->shape];
  const bool block_scale = params.weight_scale_kind == ScaleKind::kBlock128;
  const int split = 1 << plan->log_split, teams = shape.warps / split;
  plan->total_planes = params.k * (int)size_of(params.weight_dtype) / kPlaneBytes;
  plan->total_steps = ceil_div(plan->total_planes, 2);
  plan->warp_steps = ceil_div(plan->total_steps, split);
  plan->sums_bytes = split > 1 ? shape.warps * shape.row_tiles * (shape.token_tiles * 512 + 64) : 0;
  plan->depth = depth;
  plan->early = depth > 1 ? depth - 1 : 1;
  plan->ring_bytes = shape.warps * depth * ring_slot_bytes(shape.row_tiles, block_scale);
  plan->stats_bytes =
      needs_row_stats(params) ? round_up(params.m * plan->layout.partials() * (int)sizeof(float2), 16) : 0;
  const int available =
      shape.blocks > 1 ? limits.shared_bytes_all / shape.blocks - 1024 : limits.shared_bytes;
  const int room = available - plan->sums_bytes - plan->ring_bytes - plan->stats_bytes - kMaxTokens * 4 - 16;
  const int fitting = room > 0 ? room / (params.m * (kStepBytes + (block_scale ? 4 : 0))) : 0;
  if (plan->total_steps > fitting) {
    plan->warp_steps = fitting / split;
    if (plan->warp_steps == 0) return false;
  }
  plan->chunk_steps = plan->warp_steps * split;
  plan->chunks = ceil_div(plan->total_steps, plan->chunk_steps);
  const int staged = plan->chunks > 1 ? plan->chunk_steps : plan->total_steps;
  plan->tokens_bytes = staged * params.m * kStepBytes;
  plan->scales_bytes = block_scale ? round_up(staged * params.m * 4, 16) : kMaxTokens * 4;
  plan->shared_bytes = (size_t)plan->tokens_bytes + plan->scales_bytes + plan->stats_bytes +
                       plan->sums_bytes + plan->ring_bytes;
  const int teams_held = shape.warps / ceil_div(params.k, 32 * kOctet);
  plan->held = plan->chunks == 1 && params.m <= teams_held * shape.held_octets;
  const int tiles_at_once = limits.multiprocessors * shape.blocks * teams;
  plan->row_tiles = ceil_div(params.n, 16 * shape.row_tiles);
  plan->blocks = ceil_div(min(plan->row_tiles, tiles_at_once), teams);
  return true;
}

// Microseconds, roughly: the bytes of the busiest multiprocessor; what it costs to end a row tile, more with
// a barrier; the steps of a warp, one after the other; and what every block of a multiprocessor does to the
// whole input.
double estimate(const ProjectionParams& params, const DeviceLimits& limits, const ProjectionPlan& plan) {
  const KernelShape& shape = kKernelShapes[plan.shape];
  const int teams = shape.warps >> plan.log_split;
  const int rounds = ceil_div(plan.row_tiles, plan.blocks * teams);
  const int blocks = ceil_div(plan.blocks, limits.multiprocessors);  // on the busiest multiprocessor
  const double tile_us = 16.0 * shape.row_tiles * params.k * size_of(params.weight_dtype) / 34000.0;
  const bool raw = params.prologue == Prologue::kNone && params.input_dtype == params.weight_dtype;
  const double input_us = params.m * (double)params.k * (raw ? 5e-6 : plan.held ? 4e-5 : 1e-4);
  return rounds * (blocks * teams * tile_us + (plan.log_split > 0 ? 0.6 : 0.3) +
                   plan.chunks * plan.warp_steps * 0.06) +
         blocks * plan.chunks * input_us;
}

Status validate_input(const ProjectionParams& params) {
  RING_REQUIRE_POINTER(params, input);
  RING_REQUIRE_ALIGNED(params, input);
  RING_REQUIRE(params.input_row_stride >= params.k, kBadShape, "input_row_stride", "at least k",
               params.input_row_stride);
  RING_REQUIRE(params.input_row_stride % 16 == 0, kMisaligned, "input_row_stride", "a multiple of 16",
               params.input_row_stride);
  if (is_8bit(params.input_dtype)) {
    RING_REQUIRE(params.input_dtype == params.weight_dtype, kBadType, "input_dtype",
                 "weight_dtype or a float type", params.input_dtype);
    RING_REQUIRE(params.prologue == Prologue::kNone, kBadType, "prologue", "none for a quantized input",
                 params.prologue);
    RING_REQUIRE(params.input_scale != nullptr || params.static_scale != nullptr, kNullPointer, "input_scale",
                 "a pointer, or one in static_scale", 0);
    return Status{};
  }
  RING_REQUIRE(is_half(params.input_dtype) || params.input_dtype == DType::kFloat32, kBadType, "input_dtype",
               "bfloat16, float16, float32 or weight_dtype", params.input_dtype);
  if (params.prologue == Prologue::kNone) return Status{};
  RING_REQUIRE(params.prologue == Prologue::kRmsNorm || params.prologue == Prologue::kGroupNormGate, kBadType,
               "prologue", "none, rms_norm or group_norm_gate", params.prologue);
  RING_REQUIRE_POINTER(params, norm_weight);
  RING_REQUIRE_ALIGNED(params, norm_weight);
  RING_REQUIRE(params.norm_eps >= 0.0f, kBadShape, "norm_eps", "0 or more", params.norm_eps);
  if (params.prologue == Prologue::kRmsNorm) return Status{};
  RING_REQUIRE_POINTER(params, gate);
  RING_REQUIRE_ALIGNED(params, gate);
  RING_REQUIRE(params.gate_row_stride >= params.k && params.gate_row_stride % 8 == 0, kBadShape,
               "gate_row_stride", "at least k, a multiple of 8", params.gate_row_stride);
  RING_REQUIRE(params.num_norm_groups >= 1 && params.num_norm_groups <= kMaxNormGroups &&
                   params.k % (kOctet * params.num_norm_groups) == 0,
               kBadShape, "num_norm_groups", "1 to 32, and k a multiple of 8 times it",
               params.num_norm_groups);
  return Status{};
}

Status device_limits(DeviceLimits* limits) {
  int device = 0;
  RING_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device)));
  RING_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&limits->major, cudaDevAttrComputeCapabilityMajor, device)));
  RING_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device)));
  RING_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(
      &limits->shared_bytes_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device)));
  return cuda_status(shared_bytes_per_block(device, &limits->shared_bytes));
}

}  // namespace

bool needs_row_stats(const ProjectionParams& params) {
  if (params.prologue != Prologue::kNone) return true;
  return is_8bit(params.weight_dtype) && !is_8bit(params.input_dtype) &&
         params.weight_scale_kind != ScaleKind::kBlock128 && params.static_scale == nullptr;
}

bool make_plan(const ProjectionParams& params, const DeviceLimits& limits, ProjectionPlan* best) {
  double best_us = 0.0;
  for (int index = 0; index < kNumKernelShapes; ++index) {
    const KernelShape& shape = kKernelShapes[index];
    const bool wasteful = shape.token_tiles > 1 && params.m <= shape.token_tiles * 4;
    if (params.m > shape.token_tiles * 8 || wasteful) continue;
    for (int log_split = 0; 1 << log_split <= shape.warps; ++log_split) {
      ProjectionPlan plan = {};
      plan.shape = index;
      plan.log_split = log_split;
      plan.layout =
          RowLayout::of(params.k, params.prologue == Prologue::kGroupNormGate ? params.num_norm_groups : 1);
      int depth = shape.depth;
      while (depth > 0 && !fill_plan(params, limits, depth, &plan)) --depth;
      if (depth == 0) continue;
      const double us = estimate(params, limits, plan);
      if (best_us == 0.0 || us < best_us) {
        best_us = us;
        *best = plan;
      }
    }
  }
  return best_us != 0.0;
}

Status validate(const ProjectionParams& params) {
  RING_REQUIRE(params.m >= 1, kBadShape, "m", "1 or more", params.m);
  RING_REQUIRE(params.n >= 16 && params.n % 16 == 0, kBadShape, "n", "a multiple of 16", params.n);
  RING_REQUIRE(params.k >= 64 && params.k % 64 == 0, kBadShape, "k", "a multiple of 64", params.k);
  RING_REQUIRE_POINTER(params, weight);
  RING_REQUIRE_ALIGNED(params, weight);
  RING_REQUIRE(is_half(params.weight_dtype) || is_8bit(params.weight_dtype), kBadType, "weight_dtype",
               "bfloat16, float16, fp8_e4m3 or int8", params.weight_dtype);
  if (is_8bit(params.weight_dtype)) {
    RING_REQUIRE(
        params.weight_scale_kind >= ScaleKind::kTensor && params.weight_scale_kind <= ScaleKind::kBlock128,
        kBadType, "weight_scale_kind", "tensor, channel or block128", params.weight_scale_kind);
    RING_REQUIRE_POINTER(params, weight_scale);
  }
  RING_RETURN_IF_ERROR(validate_input(params));
  RING_REQUIRE_POINTER(params, output);
  RING_REQUIRE(is_half(params.output_dtype) || params.output_dtype == DType::kFloat32, kBadType,
               "output_dtype", "bfloat16, float16 or float32", params.output_dtype);
  RING_REQUIRE(params.output_row_stride >= params.n, kBadShape, "output_row_stride", "at least n",
               params.output_row_stride);
  return params.m > kMaxSmallRows ? validate_large_projection(params) : Status{};
}

size_t workspace_bytes(const ProjectionParams& params) {
  return params.m > kMaxSmallRows ? large_projection_workspace_bytes(params) : 0;
}

Status launch(const ProjectionParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  if (params.m > kMaxSmallRows) return launch_large_projection(params, stream);
  DeviceLimits limits = {};
  RING_RETURN_IF_ERROR(device_limits(&limits));
  if (hopper_row_serves(params, limits.major, limits.multiprocessors))
    return launch_hopper_row(params, limits.multiprocessors, stream);
  if (hopper_projection_serves(params, limits.major, limits.multiprocessors))
    return launch_hopper_projection(params, limits.multiprocessors, stream);
  ProjectionPlan plan = {};
  RING_REQUIRE(make_plan(params, limits, &plan), kUnsupported, "k", "an input that fits in shared memory",
               params.k);
  LaunchShape shape;
  shape.grid = dim3((unsigned)plan.blocks);
  shape.block = dim3((unsigned)kKernelShapes[plan.shape].warps * 32);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  const bool block_scale = params.weight_scale_kind == ScaleKind::kBlock128;
  ProjectionLauncher* launcher = nullptr;
  switch (params.weight_dtype) {
    case DType::kFp8E4M3: launcher = block_scale ? launch_projection_fp8_block : launch_projection_fp8; break;
    case DType::kInt8: launcher = block_scale ? launch_projection_int8_block : launch_projection_int8; break;
    case DType::kFloat16: launcher = launch_projection_fp16; break;
    default: launcher = launch_projection_bf16; break;
  }
  return launcher(params, plan, shape);
}

}  // namespace ringkernels
