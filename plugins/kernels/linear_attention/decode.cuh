// One token of linear attention per row: reads and writes the fp32 state once, everything else rides along.
//
// A block owns the columns [first, first + kColumns) of one head's state [K, V]. An output element needs only
// its own column, so blocks never talk to each other; each recomputes the norm and rotation of query and key.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "ringkernels/linear_attention.h"

namespace ringkernels {
namespace linear_attention {

constexpr int kDecodeThreads = 128;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// What a lane needs to norm and rotate a head, besides the head itself.
template <int kDim>
struct HeadTables {
  float weight[kDim / 32];
  float cosine[kDim / 64], sine[kDim / 64];

  __device__ __forceinline__ void load(const LinearAttentionDecodeParams& params, const float* norm,
                                       int row) {
    const int lane = threadIdx.x % 32, half = params.rotary_dim / 2;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) weight[i] = norm != nullptr ? norm[lane * (kDim / 32) + i] : 1.0f;
    if (params.rotary_cos == nullptr) return;
    const int64_t table = (int64_t)params.position[row] * half;
#pragma unroll
    for (int i = 0; i < kDim / 64; ++i) {
      const int j = lane + 32 * i;
      if (j >= half) continue;
      cosine[i] = params.rotary_cos[table + j];
      sine[i] = params.rotary_sin[table + j];
    }
  }
};

// One warp: head[0..kDim) = rotary(rms_norm(silu(source))) in fp32; every step is optional.
template <typename T, int kDim>
__device__ __forceinline__ void prepare_head(const LinearAttentionDecodeParams& params, const T* source,
                                             bool norm, const HeadTables<kDim>& tables, float* head) {
  constexpr int kPerLane = kDim / 32;
  const int lane = threadIdx.x % 32;
  float x[kPerLane];
  const auto packed = Vec<T, kPerLane>::load(source + lane * kPerLane);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    x[i] = to_float(packed.data[i]);
    if (params.silu) x[i] = silu(x[i]);
    squares += x[i] * x[i];
  }
  if (norm) {
    const float factor = rsqrtf(warp_sum(squares) / kDim + params.norm_eps);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) x[i] = x[i] * factor * tables.weight[i];
  }
  Vec<float, kPerLane> out;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) out.data[i] = x[i];
  out.store(head + lane * kPerLane);
  if (params.rotary_cos == nullptr) return;
  __syncwarp();
  const int half = params.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < kDim / 64; ++i) {
    const int j = lane + 32 * i;
    if (j >= half) continue;
    const float first = head[j], second = head[j + half];
    head[j] = first * tables.cosine[i] - second * tables.sine[i];
    head[j + half] = second * tables.cosine[i] + first * tables.sine[i];
  }
}

// kColumns: columns of the state per block. Grid: x = kDim / kColumns, y = head, z = row.
template <typename T, int kDim, int kColumns>
__global__ void __launch_bounds__(kDecodeThreads)
    decode_kernel(const __grid_constant__ LinearAttentionDecodeParams params) {
  constexpr int kLanes = kColumns / 4;              // threads side by side on a state row, 16 bytes each
  constexpr int kGroups = kDecodeThreads / kLanes;  // state rows in one pass of the block
  constexpr int kRows = kDim / kGroups;             // state rows of a thread
  constexpr int kWarps = kDecodeThreads / 32;
  __shared__ __align__(16) float query[kDim], key[kDim], value[kColumns];
  __shared__ __align__(16) float partial[kWarps][kColumns];

  const int head = blockIdx.y, row = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = threadIdx.x / kLanes, column = blockIdx.x * kColumns + threadIdx.x % kLanes * 4;
  // What is not settled is an input of the step: it is not read before the kernel ahead has ended.
  const auto begin = [] {
    wait_for_previous_kernel();
    allow_next_kernel();
  };
  if (!params.state_settled) begin();
  const int slot = params.slots == nullptr ? row : params.slots[row];
  if (slot < 0) {
    if (params.state_settled) begin();  // this kernel must not end before the one ahead
    return;
  }

  // All of the thread's state is requested before anything waits.
  float* state = params.state + ((int64_t)slot * params.num_heads + head) * kDim * kDim + column;
  float4 s[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    s[i] = __ldcs(reinterpret_cast<const float4*>(state + (group + i * kGroups) * kDim));
  const float* norm = warp == 0 ? params.query_norm : params.key_norm;
  HeadTables<kDim> tables;
  if (warp < 2) tables.load(params, norm, row);
  // exp() of a slow head's decay rounds away most of it; expm1() keeps it.
  const float shrink = expm1f(params.log_decay[head]);
  if (params.state_settled) begin();

  const int64_t source = row * params.row_stride + head * kDim;
  if (warp < 2) {
    const auto* from = (const T*)(warp == 0 ? params.query : params.key) + source;
    prepare_head<T, kDim>(params, from, norm != nullptr, tables, warp == 0 ? query : key);
  }
  if (warp == 2) {
    for (int i = lane; i < kColumns; i += 32) {
      const float x = to_float(((const T*)params.value)[source + blockIdx.x * kColumns + i]);
      value[i] = params.silu ? silu(x) : x;
    }
  }
  __syncthreads();

  const float4 v = *reinterpret_cast<const float4*>(value + threadIdx.x % kLanes * 4);
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float k = key[group + i * kGroups], q = query[group + i * kGroups];
    s[i].x = fmaf(k, v.x, fmaf(shrink, s[i].x, s[i].x));
    s[i].y = fmaf(k, v.y, fmaf(shrink, s[i].y, s[i].y));
    s[i].z = fmaf(k, v.z, fmaf(shrink, s[i].z, s[i].z));
    s[i].w = fmaf(k, v.w, fmaf(shrink, s[i].w, s[i].w));
    __stcs(reinterpret_cast<float4*>(state + (group + i * kGroups) * kDim), s[i]);
    sum.x = fmaf(q, s[i].x, sum.x);
    sum.y = fmaf(q, s[i].y, sum.y);
    sum.z = fmaf(q, s[i].z, sum.z);
    sum.w = fmaf(q, s[i].w, sum.w);
  }
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) {
    sum.x += __shfl_xor_sync(0xffffffffu, sum.x, offset);
    sum.y += __shfl_xor_sync(0xffffffffu, sum.y, offset);
    sum.z += __shfl_xor_sync(0xffffffffu, sum.z, offset);
    sum.w += __shfl_xor_sync(0xffffffffu, sum.w, offset);
  }
  if (lane < kLanes) *reinterpret_cast<float4*>(&partial[warp][lane * 4]) = sum;
  __syncthreads();
  if (threadIdx.x < kColumns) {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) total += partial[i][threadIdx.x];
    T* output = (T*)params.output + row * params.output_row_stride + head * kDim;
    output[blockIdx.x * kColumns + threadIdx.x] = from_float<T>(params.query_scale * total);
  }
}

}  // namespace linear_attention
}  // namespace ringkernels
