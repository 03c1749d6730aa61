// The state at the start of every segment: what each segment adds, then a scan over the segments.
#pragma once

#include "linear_attention/prefill_common.cuh"

namespace ringkernels {
namespace linear_attention {

constexpr int kSegmentStages = 3;
constexpr int kScanThreads = 256;
template <typename T, int kDim>
constexpr size_t segment_shared_bytes() {
  return kSegmentStages * 2 * kChunk * kDim * sizeof(T) + kChunk / 2 * sizeof(SplitWeights);
}

// Grid: see locate_part.
template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 2) segment_kernel(const __grid_constant__ PrefillArgs args) {
  constexpr uint32_t kTileBytes = kChunk * kDim * sizeof(T);
  extern __shared__ __align__(128) char shared[];
  SplitWeights* weights = reinterpret_cast<SplitWeights*>(shared + kSegmentStages * 2 * kTileBytes);
  const uint32_t tiles = shared_address(shared);
  const LinearAttentionPrefillParams& params = args.params;

  wait_for_previous_kernel();
  allow_next_kernel();
  const Part part = locate_part(args);
  if (part.chunks == 0) return;
  const int64_t first = part.first * params.row_stride + part.head * kDim;
  const T* keys = static_cast<const T*>(params.key) + first;
  const T* values = static_cast<const T*>(params.value) + first;
  fill_weights<T>(weights, part.log_decay, kChunk);

  const auto load = [&](int chunk) {
    if (chunk < part.chunks) {
      const uint32_t tile = tiles + chunk % kSegmentStages * 2 * kTileBytes;
      const int64_t offset = chunk * kChunk * params.row_stride;
      load_tile<T, kDim>(tile, keys + offset, params.row_stride, kChunk);
      load_tile<T, kDim>(tile + kTileBytes, values + offset, params.row_stride, kChunk);
    }
    copy_commit();  // empty at the end, so that the count of groups stays right
  };
  StateTile<T, kDim, kWarps> state;
  state.load(nullptr);
  const float shrink = expm1f(part.log_decay * kChunk);
#pragma unroll
  for (int i = 0; i < kSegmentStages - 1; ++i) load(i);
  for (int chunk = 0; chunk < part.chunks; ++chunk) {
    copy_wait<kSegmentStages - 2>();
    __syncthreads();
    load(chunk + kSegmentStages - 1);
    const uint32_t tile = tiles + chunk % kSegmentStages * 2 * kTileBytes;
    state.advance(tile, tile + kTileBytes, weights, shrink);
  }
  state.store_packed(part_state<kDim>(args, part));
}

// Turns what each segment adds into the state at its start. Grid: x = parts of a state, y = head, z = row.
// kStateWarps: of the kernels that read and write the packed states.
// A kernel of the chain starts when every block of the kernel before has passed its wait, so what ended
// before that one can be read at once; only what that one writes has to be waited for.
template <typename T, int kDim, int kStateWarps>
__global__ void __launch_bounds__(kScanThreads) scan_kernel(const __grid_constant__ PrefillArgs args) {
  constexpr int kAtOnce = 8;
  using Tile = StateTile<T, kDim, kStateWarps>;
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
  wait_for_previous_kernel();
  allow_next_kernel();
  const float log_decay = params.log_decay[head], shrink = expm1f(log_decay * args.part_tokens);
  const int remembered = remembered_tokens(log_decay, args.segment_tokens());
  const int parts = (row.length - 1) / args.segment_tokens() * args.parts;  // of all segments but the last
  float4* states = reinterpret_cast<float4*>(segment_state<kDim>(args, 0, head, blockIdx.z)) + index;
  constexpr int kStride = kDim * kDim / 4;
  for (int start = 0; start < parts; start += kAtOnce) {
    float4 added[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int after = (args.parts - 1 - (start + i) % args.parts) * args.part_tokens;
      added[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (start + i < parts && after < remembered) added[i] = states[(int64_t)(start + i) * kStride];
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (start + i >= parts) break;
      if ((start + i) % args.parts == 0) states[(int64_t)(start + i) * kStride] = running;
      running.x = fmaf(shrink, running.x, running.x) + added[i].x;
      running.y = fmaf(shrink, running.y, running.y) + added[i].y;
      running.z = fmaf(shrink, running.z, running.z) + added[i].z;
      running.w = fmaf(shrink, running.w, running.w) + added[i].w;
    }
  }
  states[(int64_t)parts * kStride] = running;
}

}  // namespace linear_attention
}  // namespace ringkernels
