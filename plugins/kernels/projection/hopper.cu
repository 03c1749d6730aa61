// Plans and launches of the product on sm_90a.
#include "projection/hopper.cuh"

#include "common/check.h"

namespace ringkernels {
namespace hopper_projection {
namespace {

Plan make_plan(const ProjectionParams& params, int multiprocessors) {
  Plan plan = {};
  plan.tokens = params.m <= 8 ? 8 : params.m <= 32 ? 32 : 64;
  plan.tiles = ceil_div(params.n, kRows);
  plan.total_steps = ceil_div(params.k * (int)size_of(params.weight_dtype), kSumBytes);
  // Rows that the busiest multiprocessor reads; a cluster takes as long as about 8 to add its sums.
  int best = 0;
  for (int split = 1; split <= kMaxSplit && split <= plan.total_steps; split *= 2) {
    const int rows = ceil_div(plan.tiles * split, multiprocessors) * kRows / split + (split > 1 ? 8 : 0);
    if (best != 0 && rows >= best) continue;
    best = rows;
    plan.split = split;
  }
  plan.block_steps = ceil_div(plan.total_steps, plan.split);
  return plan;
}

Status encode_maps(const ProjectionParams& params, int tokens, Maps* maps) {
  const int64_t size = (int64_t)size_of(params.weight_dtype), row_bytes = params.k * size;
  RING_RETURN_IF_ERROR(encode_map(&maps->weights, params.weight, params.n, row_bytes, row_bytes, kRows));
  return encode_map(&maps->tokens, params.input, params.m, row_bytes, params.input_row_stride * size, tokens);
}

}  // namespace
}  // namespace hopper_projection

bool hopper_projection_serves(const ProjectionParams& params, int major, int multiprocessors) {
#ifdef RINGKERNELS_PORTABLE_ONLY
  major = 0;  // to test on a Hopper GPU what runs on the others
#endif
  const auto aligned = [](const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; };
  // A stream so long that its start does not count: the general way keeps more of it under way.
  const bool stream = params.m <= 8 && params.n > 4 * hopper_projection::kRows * multiprocessors;
  const bool raw = params.prologue == Prologue::kNone && params.input_dtype == params.weight_dtype;
  return major == 9 && raw && !stream && params.weight_scale_kind != ScaleKind::kBlock128 &&
         aligned(params.output) && params.output_row_stride % 8 == 0;
}

Status launch_hopper_projection(const ProjectionParams& params, int multiprocessors, Stream stream) {
  using namespace hopper_projection;
  const Plan plan = make_plan(params, multiprocessors);
  Maps maps;
  RING_RETURN_IF_ERROR(encode_maps(params, plan.tokens, &maps));
  LaunchShape shape;
  shape.grid = dim3((unsigned)(plan.tiles * plan.split));
  shape.block = dim3(kThreads);
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  shape.cluster = (unsigned)plan.split;
  switch (params.weight_dtype) {
    case DType::kFp8E4M3: return launch_fp8(params, plan, maps, shape);
    case DType::kInt8: return launch_int8(params, plan, maps, shape);
    case DType::kFloat16: return launch_fp16(params, plan, maps, shape);
    default: return launch_bf16(params, plan, maps, shape);
  }
}

}  // namespace ringkernels
