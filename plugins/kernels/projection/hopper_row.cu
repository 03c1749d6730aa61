// The plan and the launch of the product of one row on sm_90a.
#include "projection/hopper_row.cuh"

#include "common/check.h"

namespace ringkernels {
namespace hopper_projection {
namespace {

RowLayout layout_of(const ProjectionParams& params) {
  return RowLayout::of(params.k, params.prologue == Prologue::kGroupNormGate ? params.num_norm_groups : 1);
}

RowPlan make_row_plan(const ProjectionParams& params, int multiprocessors, size_t shared_limit) {
  RowPlan plan = {};
  int best = 0;  // rows of the busiest multiprocessor
  for (int rows = kRows; rows >= 8; rows -= 8) {
    const int tiles = ceil_div(params.n, rows), busiest = ceil_div(tiles, multiprocessors) * rows;
    if (best != 0 && busiest >= best) continue;
    best = busiest;
    plan.rows = rows;
    plan.tiles = tiles;
  }
  plan.blocks = plan.tiles < multiprocessors ? plan.tiles : multiprocessors;
  plan.steps = params.k * (int)size_of(params.weight_dtype) / kSumBytes;
  plan.layout = layout_of(params);
  plan.stages = ceil_div(plan.tiles, plan.blocks) * plan.steps;
  if (plan.stages > kMaxRowStages) plan.stages = kMaxRowStages;
  while (plan.stages > 4 && row_shared_bytes(plan) > shared_limit) --plan.stages;
  plan.shared_bytes = row_shared_bytes(plan);
  return plan;
}

}  // namespace
}  // namespace hopper_projection

bool hopper_row_serves(const ProjectionParams& params, int major, int multiprocessors) {
  using namespace hopper_projection;
#ifdef RINGKERNELS_PORTABLE_ONLY
  major = 0;  // to test on a Hopper GPU what runs on the others
#endif
  // A stream so long that its start does not count: the general way keeps more of it under way.
  const bool stream = params.n > 4 * kRows * multiprocessors;
  const DType half =
      params.weight_dtype == DType::kFloat16 ? DType::kFloat16 : DType::kBFloat16;  // of the activations
  const DType input = params.prologue == Prologue::kRmsNorm ? DType::kFloat32 : half;
  return major == 9 && params.m == 1 && !stream && params.input_dtype == input &&
         params.weight_scale_kind != ScaleKind::kBlock128 && params.k <= kMaxRowColumns &&
         params.k * (int64_t)size_of(params.weight_dtype) % kSumBytes == 0 &&
         layout_of(params).partials() <= kMaxRowPartials;
}

Status launch_hopper_row(const ProjectionParams& params, int multiprocessors, Stream stream) {
  using namespace hopper_projection;
  int device = 0, shared_limit = 0;
  RING_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device)));
  RING_RETURN_IF_ERROR(cuda_status(shared_bytes_per_block(device, &shared_limit)));
  const RowPlan plan = make_row_plan(params, multiprocessors, (size_t)shared_limit);
  RING_REQUIRE(plan.shared_bytes <= (size_t)shared_limit, kUnsupported, "k",
               "an input that fits in shared memory", params.k);
  CUtensorMap map;
  const int64_t row_bytes = params.k * (int64_t)size_of(params.weight_dtype);
  RING_RETURN_IF_ERROR(encode_map(&map, params.weight, params.n, row_bytes, row_bytes, plan.rows));
  LaunchShape shape;
  shape.grid = dim3((unsigned)plan.blocks);
  shape.block = dim3(kRowThreads);
  shape.shared_bytes = plan.shared_bytes;
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  switch (params.weight_dtype) {
    case DType::kFp8E4M3: return launch_row_fp8(params, plan, map, shape);
    case DType::kInt8: return launch_row_int8(params, plan, map, shape);
    case DType::kFloat16: return launch_row_fp16(params, plan, map, shape);
    default: return launch_row_bf16(params, plan, map, shape);
  }
}

}  // namespace ringkernels
