// The state at the start of every segment: what each segment adds, then a scan over the segments.
#pragma once

#include "linear_attention/prefill_shares.cuh"

namespace ringkernels {
namespace linear_attention {

constexpr int kSegmentStages = 3;
constexpr int kScanThreads = 256;
struct SegmentTables {
  SplitWeights weights[kChunk / 2];
  Line<kMaxPortableShares> line;
};
template <typename T, int kDim>
constexpr size_t segment_shared_bytes() {
  return kSegmentStages * 2 * kChunk * kDim * sizeof(T) + sizeof(SegmentTables);
}

static_assert(segment_shared_bytes<__nv_bfloat16, 128>() <= 99 * 1024, "shared memory of a block on sm_86");

// Grid: the shares.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) segment_kernel(const __grid_constant__ PrefillArgs args) {
  constexpr uint32_t kTileBytes = kChunk * kDim * sizeof(T);
  extern __shared__ __align__(128) char shared[];
  SegmentTables& tables = *reinterpret_cast<SegmentTables*>(shared + kSegmentStages * 2 * kTileBytes);
  const uint32_t tiles = shared_address(shared);
  const LinearAttentionPrefillParams& params = args.params;

  wait_for_previous_kernel();
  allow_next_kernel();
  tables.line.measure(args);
  ShareWalk<kMaxPortableShares> walk(args, tables.line, blockIdx.x,
                                     tables.line.first_pair(args, blockIdx.x));
  for (Run run; walk.next(run);) {
    const int64_t first = run.first * params.row_stride + run.head * kDim;
    const auto load = [&](int chunk) {
      if (chunk < run.chunks) {
        const uint32_t tile = tiles + chunk % kSegmentStages * 2 * kTileBytes;
        const int64_t source = first + chunk * kChunk * params.row_stride;
        load_tile<T, kDim>(tile, static_cast<const T*>(params.key) + source, params.row_stride, kChunk);
        load_tile<T, kDim>(tile + kTileBytes, static_cast<const T*>(params.value) + source, params.row_stride,
                           kChunk);
      }
      copy_commit();  // empty at the end, so that the count of groups stays right
    };
    __syncthreads();  // nobody uses tiles and weights of the run before
    fill_weights<T>(tables.weights, run.log_decay, kChunk);
    StateTile<T, kDim, kWarps> state;
    state.load(nullptr);
    const float shrink = expm1f(run.log_decay * kChunk);
#pragma unroll
    for (int i = 0; i < kSegmentStages - 1; ++i) load(i);
    for (int chunk = 0; chunk < run.chunks; ++chunk) {
      copy_wait<kSegmentStages - 2>();
      __syncthreads();
      load(chunk + kSegmentStages - 1);
      const uint32_t tile = tiles + chunk % kSegmentStages * 2 * kTileBytes;
      state.advance(tile, tile + kTileBytes, tables.weights, shrink);
    }
    state.store_packed(run_state<kDim>(args, run.slot));
  }
}

// How the state goes on from one run to the next: slots of a pair lie one behind the other.
struct ScanStep {
  float shrink;
  int16_t segment;  // that this run is the first of, or -1
  int16_t used;     // 0: no run has this slot
};

template <int kMaxShares>
struct ScanSteps {
  Line<kMaxShares> line;
  ScanStep steps[2 * kMaxShares];
  int slot;  // of the first step
  int count;

  // By a whole block, for pair `index`: the same runs in the same slots as segment_kernel's blocks walk.
  // Nothing is found if no segment's sum is needed.
  __device__ __forceinline__ void find(const PrefillArgs& args, int index) {
    line.measure(args);
    const HeadRow pair = line.pairs[index];
    const int segments = line.segments(index);
    const uint32_t begin = line.start[index], end = line.start[index + 1];
    const bool any = begin < end;
    const int first = any ? line.share_at(begin) : 0, last = any ? line.share_at(end - 1) : -1;
    const int found = any ? last - first + segments : 0;
    if (threadIdx.x == 0) slot = first + pair.segments, count = found;
    for (int i = threadIdx.x; i < found; i += kScanThreads) steps[i] = ScanStep{0.0f, -1, 0};
    __syncthreads();
    const int forgotten = args.segment_tokens - pair.chunks * kChunk;  // tokens of each segment
    for (int share = first + threadIdx.x; share <= last; share += kScanThreads) {
      Run run;
      for (ShareWalk<kMaxShares> walk(args, line, share, index); walk.next(run) && run.slot < slot + found;) {
        const int tokens = run.chunks * kChunk + (run.starts >= 0 ? forgotten : 0);
        const float shrink = expm1f(pair.log_decay * tokens);
        steps[run.slot - slot] = ScanStep{shrink, static_cast<int16_t>(run.starts), 1};
      }
    }
    __syncthreads();
  }
};

// Turns what the runs add into the state at the start of each segment. Grid: x = parts of a state, y = head,
// z = row. kStateWarps, kMaxShares: of the kernels that read and write the packed states.
// A kernel of the chain starts when every block of the kernel before has passed its wait, so what ended
// before that one can be read at once; only what that one writes has to be waited for.
template <typename T, int kDim, int kStateWarps, int kMaxShares>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ PrefillArgs args) {
  constexpr int kAtOnce = 8;
  using Tile = StateTile<T, kDim, kStateWarps>;
  __shared__ ScanSteps<kMaxShares> scan;
  const LinearAttentionPrefillParams& params = args.params;
  const int head = blockIdx.y;
  const int index = blockIdx.x * kScanThreads + threadIdx.x;  // of 16 bytes in the packed state

  const Row row = locate_row(params, blockIdx.z);
  if (row.length <= 0) return;
  float4 running = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (params.reset == nullptr || params.reset[blockIdx.z] == 0) {
    // What thread index % kThreads of the tile's holds in tile index / kThreads.
    const int thread = index % Tile::kThreads, tile = index / Tile::kThreads;
    const int value = thread / 32 * (kDim / kStateWarps) + 16 * (tile / Tile::kN) + thread % 32 / 4;
    const int key = 8 * (tile % Tile::kN) + 2 * (thread % 4);
    const float* state = params.state + ((int64_t)row.slot * params.num_heads + head) * kDim * kDim;
    running.x = state[key * kDim + value];
    running.y = state[(key + 1) * kDim + value];
    running.z = state[key * kDim + value + 8];
    running.w = state[(key + 1) * kDim + value + 8];
  }
  scan.find(args, blockIdx.z * params.num_heads + head);
  wait_for_previous_kernel();
  allow_next_kernel();
  constexpr int kStride = kDim * kDim / 4;
  const float4* runs = reinterpret_cast<const float4*>(run_state<kDim>(args, scan.slot)) + index;
  float4* starts = reinterpret_cast<float4*>(segment_state<kDim>(args, 0, head, blockIdx.z)) + index;
  for (int first = 0; first < scan.count; first += kAtOnce) {
    float4 added[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      added[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (first + i < scan.count && scan.steps[first + i].used) {
        added[i] = runs[(int64_t)(first + i) * kStride];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= scan.count) break;
      const ScanStep step = scan.steps[first + i];
      if (step.segment >= 0) starts[(int64_t)step.segment * kStride] = running;
      running.x = fmaf(step.shrink, running.x, running.x) + added[i].x;
      running.y = fmaf(step.shrink, running.y, running.y) + added[i].y;
      running.z = fmaf(step.shrink, running.z, running.z) + added[i].z;
      running.w = fmaf(step.shrink, running.w, running.w) + added[i].w;
    }
  }
  starts[(int64_t)((row.length - 1) / args.segment_tokens) * kStride] = running;
}

}  // namespace linear_attention
}  // namespace ringkernels
