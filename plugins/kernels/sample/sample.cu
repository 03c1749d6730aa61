#include "ringkernels/sample.h"

#include <algorithm>

#include "common/check.h"
#include "common/launch.cuh"
#include "sample/greedy.cuh"
#include "sample/stochastic.cuh"

namespace ringkernels {

namespace {

constexpr int kMaxRows = 1024;

// Enough blocks for a few rows to fill the card, and few enough for one block to combine them.
int blocks_per_row(const SampleParams& params) {
  const int wanted = (params.vocab_size + 4 * kGreedyThreads - 1) / (4 * kGreedyThreads);
  const int share = std::max(1, 264 / std::max(params.rows, 1));
  return std::max(1, std::min({wanted, share, kGreedyThreads}));
}

}  // namespace

Status validate(const SampleParams& params) {
  RING_REQUIRE(params.rows >= 1 && params.rows <= kMaxRows, kBadShape, "rows", "1 to 1024", params.rows);
  RING_REQUIRE(params.vocab_size >= 1, kBadShape, "vocab_size", "at least 1", params.vocab_size);
  RING_REQUIRE(params.row_stride >= params.vocab_size && params.row_stride % 4 == 0, kBadShape, "row_stride",
               "a multiple of 4, at least vocab_size", params.row_stride);
  RING_REQUIRE_POINTER(params, logits);
  RING_REQUIRE_ALIGNED(params, logits);
  RING_REQUIRE_POINTER(params, tokens);
  if (params.temperature == nullptr) {
    RING_REQUIRE_POINTER(params, workspace);
    const int64_t needed = workspace_bytes(params);
    RING_REQUIRE(params.workspace_bytes >= needed, kWorkspace, "workspace_bytes", "workspace_bytes()",
                 params.workspace_bytes);
    return Status{};
  }
  RING_REQUIRE_POINTER(params, top_k);
  RING_REQUIRE_POINTER(params, top_p);
  RING_REQUIRE_POINTER(params, min_p);
  RING_REQUIRE_POINTER(params, seed);
  RING_REQUIRE_POINTER(params, position);
  return Status{};
}

size_t workspace_bytes(const SampleParams& params) {
  if (params.temperature != nullptr) return 0;
  return kMaxRows * sizeof(uint32_t) + params.rows * blocks_per_row(params) * sizeof(uint64_t);
}

Status launch(const SampleParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  LaunchShape shape;
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  if (params.temperature != nullptr) {
    shape.grid = dim3(params.rows);
    shape.block = dim3(kSampleThreads);
    return launch_kernel(stochastic_kernel, shape, params);
  }
  const int blocks = blocks_per_row(params);
  shape.grid = dim3(blocks, params.rows);
  shape.block = dim3(kGreedyThreads);
  // The counters have a place of their own: they stay zero whatever shape the next launch has.
  auto* arrived = static_cast<uint32_t*>(params.workspace);
  auto* partial = reinterpret_cast<uint64_t*>(arrived + kMaxRows);
  return launch_kernel(greedy_kernel, shape, params, GreedyWorkspace{partial, arrived});
}

}  // namespace ringkernels
