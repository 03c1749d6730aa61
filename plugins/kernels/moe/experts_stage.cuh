// The hidden state of one token as the first product wants it: normed, quantized or rounded. By a whole
// block.
#pragma once

#include <climits>

#include "moe/experts_common.cuh"

namespace ringkernels::moe {

constexpr int kMaxStageThreads = 512;
constexpr int kReduceScratch = 2 * (kMaxStageThreads / 32);  // floats

template <bool kMax>
__device__ __forceinline__ float block_reduce(float value, float* scratch) {
  value = kMax ? warp_max(value) : warp_sum(value);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  float all = scratch[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) all = kMax ? max_or_nan(all, scratch[w]) : all + scratch[w];
  return all;
}

// store(k, values, scale) takes 8 elements at k; put_scale(block, scale) takes the scales to keep.
// sums: kReduceScratch floats. ready() is called before the first read of what an earlier kernel wrote.
// A thread keeps its first 8 elements in registers; those of longer rows it reads again.
template <typename Format, bool kBlock, typename Ready, typename Store, typename PutScale>
__device__ __forceinline__ void stage_hidden(const ExpertsParams& p, int token, float* sums, Ready ready,
                                             Store store, PutScale put_scale) {
  const int first = threadIdx.x * 8, stride = blockDim.x * 8;
  const int64_t start = (int64_t)token * p.hidden_size;
  float factor = 1.0f;
  auto load_again = [&](int k, float (&x)[8]) {
    load_hidden8(p, start + k, x);
    if (p.norm_weight == nullptr) return;
    float weight[8];
    load8(p.norm_weight + k, weight);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = x[j] * factor * weight[j];
  };
  float x[8] = {}, weight[8] = {};
  if (p.norm_weight != nullptr && first < p.hidden_size) load8(p.norm_weight + first, weight);
  ready();
  if (first < p.hidden_size) load_hidden8(p, start + first, x);
  if (p.norm_weight != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares = fmaf(x[j], x[j], squares);
    for (int k = first + stride; k < p.hidden_size; k += stride) {
      float y[8];
      load_hidden8(p, start + k, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = fmaf(y[j], y[j], squares);
    }
    factor = rsqrtf(block_reduce<false>(squares, sums) / p.hidden_size + p.norm_eps);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = x[j] * factor * weight[j];
  }
  float scale = 1.0f;
  const bool dynamic = is_8bit(Format::kType) && p.gate_up_input_scale == nullptr;
  if (is_8bit(Format::kType) && !dynamic) scale = *p.gate_up_input_scale;
  if (dynamic && !kBlock) {
    float largest = absmax8(x);
    for (int k = first + stride; k < p.hidden_size; k += stride) {
      float y[8];
      load_again(k, y);
      largest = max_or_nan(largest, absmax8(y));
    }
    scale = dynamic_scale<Format>(block_reduce<true>(largest, sums + kMaxStageThreads / 32));
  }
  if (is_8bit(Format::kType) && !kBlock && threadIdx.x == 0) put_scale(0, scale);
  auto finish = [&](int k, const float (&values)[8]) {
    if constexpr (kBlock) {  // 16 lanes have a block; they are all here, for hidden_size is a multiple of 128
      if (dynamic) {
        const unsigned lanes = 0xffffu << (threadIdx.x % 32 / 16 * 16);
        float largest = absmax8(values);
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) {
          largest = max_or_nan(largest, __shfl_xor_sync(lanes, largest, offset));
        }
        scale = dynamic_scale<Format>(largest);
      }
      if (threadIdx.x % 16 == 0) put_scale(k / kScaleBlock, scale);
    }
    store(k, values, scale);
  };
  if (first < p.hidden_size) finish(first, x);
  for (int k = first + stride; k < p.hidden_size; k += stride) {
    float y[8];
    load_again(k, y);
    finish(k, y);
  }
}

// Prepares one token in the workspace. scratch, ready: see stage_hidden.
template <typename Format, bool kBlock, typename Ready>
__device__ __forceinline__ void prepare_token(const ExpertsParams& p, const ExpertsPlan& plan, int token,
                                              float* scratch, Ready ready) {
  using Activation = typename Format::Activation;
  const int scales = kBlock ? blocks_of(p.hidden_size) : 1;
  auto* target = reinterpret_cast<Activation*>(plan.codes) + (int64_t)token * p.hidden_size;
  float* scale = plan.code_scales + (int64_t)token * scales;
  if (is_8bit(Format::kType) && p.quantized_hidden != nullptr) {
    ready();
    const auto* codes = static_cast<const uint8_t*>(p.quantized_hidden) + (int64_t)token * p.hidden_size;
    for (int k = threadIdx.x * 16; k < p.hidden_size; k += blockDim.x * 16)
      copy_codes<Format>(target + k, codes + k);
    const bool given = p.gate_up_input_scale != nullptr;
    for (int i = threadIdx.x; i < scales; i += blockDim.x) {
      scale[i] = given ? *p.gate_up_input_scale : p.hidden_scale[(int64_t)token * scales + i];
    }
    return;
  }
  stage_hidden<Format, kBlock>(
      p, token, scratch, ready,
      [&](int k, const float (&x)[8], float divisor) { store_encoded<Format>(target + k, x, divisor); },
      [&](int block, float value) { scale[block] = value; });
}

// grid: pairs / 8. Quantizes or rounds the SwiGLU outputs, a warp per pair.
template <typename Format, bool kBlock>
__global__ void __launch_bounds__(kThreads)
    prepare_intermediate_kernel(const __grid_constant__ ExpertsParams p,
                                const __grid_constant__ ExpertsPlan plan) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int choices = choices_of(p), width = widest(p), scales = kBlock ? blocks_of(width) : 1;
  const int pair = blockIdx.x * kWarps + threadIdx.x / 32;
  if (pair >= p.tokens * choices) return;
  const int columns = pair % choices == p.top_k ? p.shared_intermediate_size : p.intermediate_size;
  auto* target = plan.intermediate_codes + (int64_t)pair * row_bytes_of<Format>(width);
  stage_intermediate<Format, kBlock>(plan.intermediate + (int64_t)pair * width, columns, 0, INT_MAX,
                                     p.down_input_scale,
                                     reinterpret_cast<typename Format::Activation*>(target),
                                     plan.intermediate_scales + (int64_t)pair * scales);
}

}  // namespace ringkernels::moe
