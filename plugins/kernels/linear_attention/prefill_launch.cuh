// Launches the kernels of a prefill for one dtype.
#pragma once

#include <algorithm>

#include "common/check.h"
#include "linear_attention/prefill.h"
#include "linear_attention/prefill_chunks.cuh"
#include "linear_attention/prefill_hopper.cuh"
#include "linear_attention/prefill_segments.cuh"

namespace ringkernels {
namespace linear_attention {

struct PrefillKernel {
  void (*function)(PrefillArgs);
  int threads;
  size_t shared_bytes;
};

template <typename T, int kDim, int kStateWarps, int kMaxShares>
Status launch_chain(PrefillArgs args, const PrefillPlan& plan, const PrefillKernel& segments,
                    const PrefillKernel& chunks, Stream stream) {
  const size_t on_an_sm = plan.sm_shared_bytes / (segments.shared_bytes + 1024);  // 1 KB is the driver's
  args.shares = std::min<int>(kMaxShares, plan.sms * std::clamp<int>(on_an_sm, 1, 2));
  LaunchShape shape;
  shape.stream = stream;
  shape.programmatic = args.params.programmatic_launch != 0;
  if (args.segments > 1) {
    shape.grid = dim3(args.shares);
    shape.block = dim3(segments.threads);
    shape.shared_bytes = segments.shared_bytes;
    RING_RETURN_IF_ERROR(launch_kernel(segments.function, shape, args));
    shape.grid = dim3(kDim * kDim / 4 / kScanThreads, args.params.num_heads, args.params.batch);
    shape.block = dim3(kScanThreads);
    shape.shared_bytes = 0;
    shape.programmatic = true;  // all kernels of the chain wait
    RING_RETURN_IF_ERROR(launch_kernel(scan_kernel<T, kDim, kStateWarps, kMaxShares>, shape, args));
  }
  shape.grid = dim3(args.segments, args.params.num_heads, args.params.batch);
  shape.block = dim3(chunks.threads);
  shape.shared_bytes = chunks.shared_bytes;
  return launch_kernel(chunks.function, shape, args);
}

template <typename T, int kDim>
Status launch_any(const PrefillArgs& args, const PrefillPlan& plan, Stream stream) {
  const PrefillKernel segments{segment_kernel<T, kDim>, kThreads, segment_shared_bytes<T, kDim>()};
  PrefillKernel chunks{chunk_kernel<T, kDim, 2>, kThreads, chunk_shared_bytes<T, kDim, 2>()};
  if (chunks.shared_bytes > plan.shared_bytes) {
    chunks = {chunk_kernel<T, kDim, 1>, kThreads, chunk_shared_bytes<T, kDim, 1>()};
  }
  return launch_chain<T, kDim, kWarps, kMaxPortableShares>(args, plan, segments, chunks, stream);
}

template <typename T>
Status launch_prefill(const LinearAttentionPrefillParams& params, const PrefillPlan& plan, Stream stream) {
  const PrefillArgs args{params, plan.segments, plan.segment_tokens, 0};
  if (plan.hopper) {
    const PrefillKernel segments{hopper::segment_kernel<T>, hopper::kThreads, hopper::SegmentShared::kBytes};
    const PrefillKernel chunks{hopper::chunk_kernel<T>, hopper::kThreads, hopper::ChunkShared::kBytes};
    return launch_chain<T, hopper::kDim, hopper::kComputeWarps, kMaxHopperShares>(args, plan, segments,
                                                                                  chunks, stream);
  }
  return params.head_dim == 64 ? launch_any<T, 64>(args, plan, stream)
                               : launch_any<T, 128>(args, plan, stream);
}

}  // namespace linear_attention
}  // namespace ringkernels
