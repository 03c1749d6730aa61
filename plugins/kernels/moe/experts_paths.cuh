// Launches of the paths for few tokens; instantiated once per weight format.
#pragma once

#include "common/check.h"
#include "moe/experts_direct.cuh"
#include "moe/experts_sorted.cuh"

namespace ringkernels::moe {

template <typename Format, bool kBlock>
Status launch_prepare_intermediate(const ExpertsParams& p, const ExpertsPlan& plan, LaunchShape shape) {
  shape.grid = dim3((p.tokens * choices_of(p) + kWarps - 1) / kWarps);
  shape.block = dim3(kThreads);
  shape.shared_bytes = 0;
  return launch_kernel(prepare_intermediate_kernel<Format, kBlock>, shape, p, plan);
}

template <typename Format, bool kBlock>
Status launch_direct_kernels(const ExpertsParams& p, Stream stream) {
  const ExpertsPlan plan = plan_experts(p, false);
  const int width = widest(p), choices = choices_of(p);
  LaunchShape shape;
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  const bool stage = p.tokens == 1 && plan.codes != nullptr && p.quantized_hidden == nullptr;
  if (plan.codes != nullptr && !stage) {
    shape.grid = dim3(p.tokens);
    shape.block = dim3(kThreads);
    RING_RETURN_IF_ERROR(launch_kernel(prepare_tokens_kernel<Format, kBlock>, shape, p, plan));
  }
  // A warp takes one step of each row if 16 warps are enough. Few slots, so that many blocks fit a
  // multiprocessor.
  const int segments = p.hidden_size * Format::kElementBytes / kSegmentBytes;
  const int warps = segments > kWarps * kStepSegments ? kMaxGateUpWarps : kWarps;
  const int slots = p.tokens == 1 ? 1 : p.tokens <= 4 ? 2 : 4;
  const int shared_groups = has_shared(p) ? (p.tokens + slots - 1) / slots : 0;
  shape.grid = dim3(2 * width / kRowTile, shared_groups + p.tokens * p.top_k);
  shape.block = dim3(warps * 32);
  shape.shared_bytes =
      (size_t)warps * kStepBytes + (size_t)slots * (token_pitch(p.weight_dtype, p.hidden_size) +
                                                    (kBlock ? blocks_of(p.hidden_size) : 1) * sizeof(float));
  RING_RETURN_IF_ERROR(
      stage ? launch_kernel(direct_gate_up_kernel<Format, kBlock, true>, shape, p, plan, slots)
            : launch_kernel(direct_gate_up_kernel<Format, kBlock, false>, shape, p, plan, slots));
  if (p.tokens > 1) RING_RETURN_IF_ERROR((launch_prepare_intermediate<Format, kBlock>(p, plan, shape)));
  const int pitch = token_pitch(p.weight_dtype, width), scales = kBlock ? blocks_of(width) : 1;
  const int room =
      (int)((shared_limit() - 2048) / (kDownSteps * kStepBytes + pitch + scales * sizeof(float)));
  const int most = room < kMaxDownWarps ? room : kMaxDownWarps, at_once = choices < most ? choices : most;
  const int steps = (segments_of(width, Format::kElementBytes) + kStepSegments - 1) / kStepSegments;
  const int wanted = (steps + kDownSteps - 1) / kDownSteps,
            parts = most / at_once < wanted ? most / at_once : wanted;
  shape.grid = dim3(p.hidden_size / kRowTile, p.tokens);
  shape.block = dim3(at_once * parts * 32);
  shape.shared_bytes = (size_t)at_once * (pitch + parts * (kDownSteps * kStepBytes + scales * sizeof(float)));
  if (p.tokens == 1) return launch_kernel(direct_down_kernel<Format, kBlock, false>, shape, p, plan, parts);
  return launch_kernel(direct_down_kernel<Format, kBlock, true>, shape, p, plan, parts);
}

template <typename Format, bool kBlock, int kTiles, bool kDown>
Status launch_product(const ExpertsParams& p, const ExpertsPlan& plan, LaunchShape shape,
                      int multiprocessors) {
  const size_t stage = stage_bytes_of(p, kTiles, kDown);
  const size_t room = shared_limit();
  int warps = kMaxProductWarps;
  Ring ring = {};
  ring.steps = kDown ? kDownRingSteps : kGateUpRingSteps;
  const auto ring_bytes = [&] { return (size_t)warps * ring.steps * kStepBytes; };
  while (warps > kMinProductWarps && ring_bytes() + stage > room) --warps;
  if (ring_bytes() + stage > room) ring.steps = kLeastRingSteps;
  const int fit = (int)((room - ring_bytes()) / stage);
  ring.buffers = fit < kMaxBuffers ? fit : kMaxBuffers;
  shape.shared_bytes = ring_bytes() + ring.buffers * stage;
  shape.grid = dim3(multiprocessors);
  shape.block = dim3(warps * 32);
  return launch_kernel(sorted_product_kernel<Format, kBlock, kTiles, kDown>, shape, p, plan, ring);
}

template <typename Format, bool kBlock, int kTiles>
Status launch_sorted_kernels(const ExpertsParams& p, const ExpertsPlan& plan, Stream stream) {
  LaunchShape shape;
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  shape.grid = dim3(plan.codes != nullptr ? 1 + p.tokens : 1);
  shape.block = dim3(kSortThreads);
  RING_RETURN_IF_ERROR(launch_kernel(sort_pairs_kernel<Format, kBlock>, shape, p, plan));
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return cuda_status(error);
  RING_RETURN_IF_ERROR((launch_product<Format, kBlock, kTiles, false>(p, plan, shape, multiprocessors)));
  RING_RETURN_IF_ERROR((launch_product<Format, kBlock, kTiles, true>(p, plan, shape, multiprocessors)));
  return launch_combine(p, plan, stream);
}

template <typename Format>
Status ExpertsPath<Format>::launch_direct(const ExpertsParams& p, Stream stream) {
  if constexpr (is_8bit(Format::kType)) {
    if (p.scale_kind == ScaleKind::kBlock128) return launch_direct_kernels<Format, true>(p, stream);
  }
  return launch_direct_kernels<Format, false>(p, stream);
}

template <typename Format>
Status ExpertsPath<Format>::launch_sorted(const ExpertsParams& p, Stream stream) {
  const ExpertsPlan plan = plan_experts(p, true);
  const bool two = plan.tokens_per_group > kTokenTile;
  if constexpr (is_8bit(Format::kType)) {
    if (p.scale_kind == ScaleKind::kBlock128) {
      return two ? launch_sorted_kernels<Format, true, 2>(p, plan, stream)
                 : launch_sorted_kernels<Format, true, 1>(p, plan, stream);
    }
  }
  return two ? launch_sorted_kernels<Format, false, 2>(p, plan, stream)
             : launch_sorted_kernels<Format, false, 1>(p, plan, stream);
}

}  // namespace ringkernels::moe
