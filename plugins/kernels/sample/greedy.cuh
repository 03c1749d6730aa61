// The largest logit of each row: blocks share a row, and the last of them to finish combines.
#pragma once

#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "ringkernels/sample.h"

namespace ringkernels {

// Orders floats as unsigned integers do; NaN comes out above everything, so that it is not overlooked. The sum makes
// one number of both zeros, and of all NaN the positive one.
__device__ __forceinline__ uint32_t ordered_bits(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Larger means better: first the value, then the lower id.
__device__ __forceinline__ uint64_t packed_choice(float value, uint32_t id) {
  return static_cast<uint64_t>(ordered_bits(value)) << 32 | (0xffffffffu - id);
}

constexpr int kGreedyThreads = 512;
constexpr int kGreedyWarps = kGreedyThreads / 32;

template <int kLanes>
__device__ __forceinline__ uint64_t warp_max(uint64_t best) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(0xffffffffu, best, offset);
    best = other > best ? other : best;
  }
  return best;
}

// Of all threads of a block. For few rows a kernel takes as long as its instructions do, so that what is called more
// than once is not inlined, and loops are not unrolled where that gains nothing.
__device__ __noinline__ uint64_t block_max(uint64_t best, uint64_t* shared) {
  best = warp_max<32>(best);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = best;
  __syncthreads();
  best = warp_max<kGreedyWarps>(shared[threadIdx.x % kGreedyWarps]);
  __syncthreads();
  return best;
}

struct GreedyWorkspace {
  uint64_t* partial;  // [rows, blocks]
  uint32_t* arrived;  // [rows], zero between launches
};

__global__ void __launch_bounds__(kGreedyThreads)
greedy_kernel(const __grid_constant__ SampleParams params, GreedyWorkspace workspace) {
  __shared__ uint64_t shared[kGreedyThreads / 32];
  __shared__ bool last;
  if (params.programmatic_launch) wait_for_previous_kernel();
  allow_next_kernel();
  const int row = blockIdx.y;
  const float* logits = params.logits + row * params.row_stride;
  uint64_t best = 0;
  const int vectors = params.vocab_size / 4;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < vectors; i += gridDim.x * blockDim.x) {
    const float4 four = reinterpret_cast<const float4*>(logits)[i];
    const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint64_t choice = packed_choice(values[j], 4 * i + j);
      best = choice > best ? choice : best;
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < params.vocab_size % 4) {
    const uint32_t id = 4 * vectors + threadIdx.x;
    const uint64_t choice = packed_choice(logits[id], id);
    best = choice > best ? choice : best;
  }
  best = block_max(best, shared);
  if (threadIdx.x == 0) {
    workspace.partial[row * gridDim.x + blockIdx.x] = best;
    __threadfence();
    last = atomicAdd(workspace.arrived + row, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  best = threadIdx.x < gridDim.x ? __ldcg(workspace.partial + row * gridDim.x + threadIdx.x) : 0;
  best = block_max(best, shared);
  if (threadIdx.x == 0) {
    params.tokens[row] = 0xffffffffu - static_cast<uint32_t>(best);
    workspace.arrived[row] = 0;
    if (params.next_position != nullptr) ++params.next_position[row];
  }
}

}  // namespace ringkernels
