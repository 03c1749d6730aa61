#include "ringkernels/sample.h"

#include <algorithm>

#include "common/check.h"
#include "common/launch.cuh"
#include "sample/greedy.cuh"
#include "sample/stochastic.cuh"

namespace ringkernels {

namespace {

constexpr int kMaxRows = 1024;
constexpr int kUsualSms = 132;

// Enough blocks for a few rows to fill the card, and few enough for one block to combine them.
int blocks_per_row(const SampleParams& params, int blocks_per_sm, int threads) {
  const int wanted = (params.vocab_size + 4 * threads - 1) / (4 * threads);
  const int share = std::max(1, kUsualSms * blocks_per_sm / std::max(params.rows, 1));
  return std::max(1, std::min({wanted, share, threads}));
}

int greedy_blocks(const SampleParams& params) { return blocks_per_row(params, 2, kGreedyThreads); }

int stochastic_blocks(const SampleParams& params) {
  constexpr int kMostTokens = 65532;  // of a block: see histogram_kernel
  const int least = (params.vocab_size + kMostTokens - 1) / kMostTokens;
  return std::max(least, blocks_per_row(params, kSampleBlocksPerSm, kSampleThreads));
}

bool has_filter(const SampleParams& params) { return params.top_k != nullptr || params.top_p != nullptr; }

// Lays a workspace out, or only measures it where there is none. Counters have a place of their own: they stay zero
// whatever shape the next launch has.
class Carver {
 public:
  explicit Carver(void* start) : start_(static_cast<char*>(start)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = (bytes_ + 15) / 16 * 16;
    bytes_ = begin + count * static_cast<int64_t>(sizeof(T));
    return start_ == nullptr ? nullptr : reinterpret_cast<T*>(start_ + begin);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* start_;
  int64_t bytes_ = 0;
};

SampleWorkspace carve(const SampleParams& params, Carver& carver) {
  SampleWorkspace workspace{};
  const int64_t rows = params.rows, blocks = rows * stochastic_blocks(params);
  workspace.arrived = carver.take<uint32_t>(kMaxRows);
  workspace.listed = carver.take<uint32_t>(kMaxRows);
  workspace.extremes = carver.take<Extremes>(blocks);
  workspace.drawn = carver.take<uint64_t>(blocks);
  if (has_filter(params)) {
    workspace.weights = carver.take<unsigned long long>(rows * kBins);
    workspace.list = carver.take<unsigned long long>(rows * kMaxListed);
    workspace.counts = carver.take<uint32_t>(rows * kBins);
  }
  return workspace;
}

Status draw(const SampleParams& params, LaunchShape shape) {
  Carver carver(params.workspace);
  const SampleWorkspace workspace = carve(params, carver);
  shape.grid = dim3(stochastic_blocks(params), params.rows);
  shape.block = dim3(kSampleThreads);
  RING_RETURN_IF_ERROR(launch_kernel(measure_kernel, shape, params, workspace));
  if (has_filter(params)) RING_RETURN_IF_ERROR(launch_kernel(histogram_kernel, shape, params, workspace));
  return launch_kernel(draw_kernel, shape, params, workspace);
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
  RING_REQUIRE_POINTER(params, workspace);
  const int64_t needed = workspace_bytes(params);
  RING_REQUIRE(params.workspace_bytes >= needed, kWorkspace, "workspace_bytes", "workspace_bytes()",
               params.workspace_bytes);
  if (params.penalty != nullptr) {
    RING_REQUIRE_POINTER(params, temperature);
    RING_REQUIRE_POINTER(params, seen);
    RING_REQUIRE_POINTER(params, seen_slot);
  }
  if (params.temperature == nullptr) return Status{};
  RING_REQUIRE_POINTER(params, seed);
  RING_REQUIRE_POINTER(params, position);
  return Status{};
}

size_t workspace_bytes(const SampleParams& params) {
  if (params.temperature == nullptr) {
    return kMaxRows * sizeof(uint32_t) + params.rows * greedy_blocks(params) * sizeof(uint64_t);
  }
  Carver carver(nullptr);
  carve(params, carver);
  return carver.bytes();
}

Status launch(const SampleParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  LaunchShape shape;
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  if (params.temperature != nullptr) return draw(params, shape);
  shape.grid = dim3(greedy_blocks(params), params.rows);
  shape.block = dim3(kGreedyThreads);
  auto* arrived = static_cast<uint32_t*>(params.workspace);
  auto* partial = reinterpret_cast<uint64_t*>(arrived + kMaxRows);
  return launch_kernel(greedy_kernel, shape, params, GreedyWorkspace{partial, arrived});
}

}  // namespace ringkernels
