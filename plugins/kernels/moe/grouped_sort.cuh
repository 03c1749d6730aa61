// Before and after the grouped products: sort the chosen (token, expert) pairs by expert, bring the tokens'
// rows into that order (quantizing them), quantize between the products, and add up each token's experts.
#pragma once

#include <cfloat>

#include "moe/grouped_plan.cuh"

namespace ringkernels::grouped {

constexpr int kSortThreads = 1024;  // pairs per block
constexpr int kMaxExperts = 1024;

struct SortParams {
  const int32_t* expert_ids;   // [pairs]
  int32_t* rank;               // [pairs] among the block's pairs of the same expert, or -1
  int32_t* block_first;        // [blocks, experts] earlier pairs of the expert
  int32_t* rows;               // [experts + 1]
  int32_t* counts;             // [experts]
  int32_t* tiles[2];           // [groups + 1] of each product
  int32_t* counter;            // zero between launches
  int32_t weight_tiles[2][2];  // [product][side]
  int32_t pairs;
  int32_t num_experts;
  int32_t shared_tokens;  // 0: no shared expert
};

// Exclusive sum over the block; `total` receives the sum. scratch: [33].
__device__ __forceinline__ int block_scan(int value, int* scratch, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  __syncthreads();
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < kSortThreads / 32; ++w) {
    if (w < warp) before += scratch[w];
    total += scratch[w];
  }
  return before + sum - value;
}

// The last block: from counts per block to first rows and tiles.
__device__ __forceinline__ void plan(const SortParams& p, int* scratch) {
  __shared__ int sums[kMaxExperts];
  constexpr int kAhead = 8;
  const int segments = max(1, kSortThreads / p.num_experts), blocks = gridDim.x;
  const int per_segment = ceil_div(blocks, segments);
  const int expert = threadIdx.x % p.num_experts, segment = threadIdx.x / p.num_experts;
  const int begin = segment * per_segment, end = segment < segments ? min(blocks, begin + per_segment) : 0;
  int sum = 0;
#pragma unroll 8
  for (int block = begin; block < end; ++block) sum += __ldcg(&p.block_first[block * p.num_experts + expert]);
  if (segment < segments) sums[segment * p.num_experts + expert] = sum;
  __syncthreads();
  int first = 0, count = 0;
  if (segment < segments)
    for (int other = 0; other < segment; ++other) first += sums[other * p.num_experts + expert];
  for (int block = begin; block < end; block += kAhead) {
    int added[kAhead];  // loaded together: a store between two loads would hold up the second
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
      added[i] = block + i < end ? __ldcg(&p.block_first[(block + i) * p.num_experts + expert]) : 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (block + i < end) p.block_first[(block + i) * p.num_experts + expert] = first;
      first += added[i];
    }
  }
  if (threadIdx.x < p.num_experts)
    for (int other = 0; other < segments; ++other) count += sums[other * p.num_experts + threadIdx.x];
  int total;
  const int row = block_scan((count + kRowAlignment - 1) / kRowAlignment * kRowAlignment, scratch, total);
  if (threadIdx.x < p.num_experts) {
    p.rows[threadIdx.x] = row;
    p.counts[threadIdx.x] = count;
  }
  if (threadIdx.x == 0) p.rows[p.num_experts] = total;
  for (int product = 0; product < 2; ++product) {
    const int tiles = ceil_div(count, kTokenTile) * p.weight_tiles[product][0];
    const int tile = block_scan(tiles, scratch, total);
    if (threadIdx.x < p.num_experts) p.tiles[product][threadIdx.x] = tile;
    if (threadIdx.x == 0) {
      p.tiles[product][p.num_experts] = total;
      if (p.shared_tokens > 0)
        p.tiles[product][p.num_experts + 1] =
            total + ceil_div(p.shared_tokens, kTokenTile) * p.weight_tiles[product][1];
    }
  }
}

// Shared memory: uint16 [32, experts]. The order within an expert is that of the tokens.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const SortParams p) {
  extern __shared__ uint16_t counts[];
  __shared__ int scratch[33];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  wait_for_previous_kernel();
  const int pair = blockIdx.x * kSortThreads + threadIdx.x;
  const int expert = pair < p.pairs ? p.expert_ids[pair] : -1;
  const bool valid = expert >= 0 && expert < p.num_experts;
  for (int i = threadIdx.x; i < 32 * p.num_experts; i += kSortThreads) counts[i] = 0;
  __syncthreads();
  const unsigned same = __match_any_sync(0xffffffffu, valid ? expert : -1);
  const int before = __popc(same & ((1u << lane) - 1));
  if (valid && before == 0) counts[warp * p.num_experts + expert] = static_cast<uint16_t>(__popc(same));
  __syncthreads();
  for (int e = threadIdx.x; e < p.num_experts; e += kSortThreads) {
    int sum = 0;
    constexpr int kHeld = 16;  // counts loaded together
    for (int first = 0; first < kSortThreads / 32; first += kHeld) {
      uint16_t of_warp[kHeld];
#pragma unroll
      for (int w = 0; w < kHeld; ++w) of_warp[w] = counts[(first + w) * p.num_experts + e];
#pragma unroll
      for (int w = 0; w < kHeld; ++w) {
        counts[(first + w) * p.num_experts + e] = static_cast<uint16_t>(sum);
        sum += of_warp[w];
      }
    }
    p.block_first[blockIdx.x * p.num_experts + e] = sum;
  }
  __syncthreads();
  if (pair < p.pairs) p.rank[pair] = valid ? counts[warp * p.num_experts + expert] + before : -1;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool last = atomicAdd(p.counter, 1) == static_cast<int>(gridDim.x) - 1;
    if (last) *p.counter = 0;
    scratch[32] = last;
  }
  __syncthreads();
  if (scratch[32] == 0) return;
  __threadfence();
  plan(p, scratch);
}

// How rows are quantized; all null or 0 where they are copied.
struct RowFormat {
  const float* static_scale;  // [1] or null: dynamic
  const float* given_scale;   // scales of rows that are quantized already: [N] or [N, D / 128]
  int32_t block_scale;        // one per 128 elements, else one per row
  int32_t int8;               // else FP8
};

struct PermuteParams {
  const void* hidden;  // [N, row_bytes] to copy, or [N, D] 16-bit to quantize
  const int32_t* expert_ids;
  const int32_t* rank;
  const int32_t* block_first;
  const int32_t* rows;
  int32_t* pair_rows;  // [N, top_k] row of each pair, or -1
  uint8_t* output[2];  // routed, shared (or null)
  float* scale[2];
  int32_t scale_stride[2];
  RowFormat format;
  int32_t row_bytes;  // of the output
  int32_t top_k;
  int32_t num_experts;
};

constexpr int kPermuteThreads = 128;
constexpr int kMaxTopK = 32;

__device__ __forceinline__ float scale_of(float absmax, bool int8) {
  return absmax < kLeastAbsmax ? FLT_EPSILON : absmax / number_range(int8 ? DType::kInt8 : DType::kFp8E4M3);
}

template <typename T, int kCount>
__device__ __forceinline__ float absmax_of(const Vec<T, kCount>& values) {
  float absmax = 0.0f;
#pragma unroll
  for (const T& value : values.data) absmax = max_or_nan(absmax, fabsf(to_float(value)));
  return absmax;
}

// kCount codes, four to a word.
template <typename T, int kCount>
__device__ __forceinline__ Vec<uint32_t, kCount / 4> quantized(const Vec<T, kCount>& values, float scale,
                                                               bool int8) {
  Vec<uint32_t, kCount / 4> codes;
  const float reciprocal = 1.0f / scale;
#pragma unroll
  for (int word = 0; word < kCount / 4; ++word) {
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // x / scale rounded to nearest, by one correction of the product with the reciprocal (Markstein).
      const float x = to_float(values.data[4 * word + i]), close = x * reciprocal;
      scaled[i] = fabsf(close) < 1024.0f ? fmaf(fmaf(-close, scale, x), reciprocal, close) : close;
    }
    if (int8) {
      uint32_t packed = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i)
        packed |= static_cast<uint32_t>(static_cast<uint8_t>(to_int8(scaled[i]))) << (8 * i);
      codes.data[word] = packed;
    } else {
      const uint32_t low = __nv_cvt_float2_to_fp8x2({scaled[0], scaled[1]}, __NV_SATFINITE, __NV_E4M3);
      const uint32_t high = __nv_cvt_float2_to_fp8x2({scaled[2], scaled[3]}, __NV_SATFINITE, __NV_E4M3);
      codes.data[word] = low | high << 16;
    }
  }
  return codes;
}

// grid: N. Source: uint8_t copies rows of bytes; a 16-bit type is quantized.
template <typename Source>
__global__ void __launch_bounds__(kPermuteThreads) permute_kernel(const PermuteParams p) {
  constexpr bool kCopy = sizeof(Source) == 1;
  __shared__ int64_t rows[kMaxTopK + 1];
  __shared__ float maxima[kPermuteThreads / 32];
  const int token = blockIdx.x;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x < p.top_k) {
    const int pair = token * p.top_k + threadIdx.x, rank = p.rank[pair];
    int row = -1;
    if (rank >= 0) {
      const int expert = p.expert_ids[pair];
      row = p.rows[expert] + p.block_first[pair / kSortThreads * p.num_experts + expert] + rank;
    }
    rows[threadIdx.x] = p.pair_rows[pair] = row;
  }
  if (threadIdx.x == p.top_k) rows[p.top_k] = p.output[1] != nullptr ? token : -1;
  const Source* from = static_cast<const Source*>(p.hidden) + static_cast<int64_t>(token) * p.row_bytes;
  const int vectors = p.row_bytes / 16;
  const bool dynamic = !kCopy && p.format.static_scale == nullptr;
  float scale = p.format.static_scale != nullptr ? *p.format.static_scale : 1.0f;
  if (dynamic && !p.format.block_scale) {
    float absmax = 0.0f;
    if constexpr (!kCopy)
      for (int vector = threadIdx.x; vector < vectors; vector += kPermuteThreads)
        absmax = max_or_nan(absmax, absmax_of(Vec<Source, 16>::load(from + vector * 16)));
    absmax = warp_max(absmax);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = absmax;
    __syncthreads();
#pragma unroll
    for (float other : maxima) absmax = max_or_nan(absmax, other);
    scale = scale_of(absmax, p.format.int8);
  } else {
    __syncthreads();
  }
  for (int vector = threadIdx.x; vector < vectors; vector += kPermuteThreads) {
    uint4 codes;
    if constexpr (kCopy) {
      codes = *reinterpret_cast<const uint4*>(from + vector * 16);
      if (p.format.given_scale != nullptr)
        scale = p.format.given_scale[p.format.block_scale ? token * (vectors / 8) + vector / 8 : token];
    } else {
      const Vec<Source, 16> values = Vec<Source, 16>::load(from + vector * 16);
      if (dynamic && p.format.block_scale) {  // 8 threads hold a block
        float absmax = absmax_of(values);
#pragma unroll
        for (int offset = 1; offset < 8; offset *= 2)
          absmax = max_or_nan(absmax, __shfl_xor_sync(0xffu << (threadIdx.x % 32 / 8 * 8), absmax, offset));
        scale = scale_of(absmax, p.format.int8);
      }
      const Vec<uint32_t, 4> words = quantized(values, scale, p.format.int8);
      codes = make_uint4(words.data[0], words.data[1], words.data[2], words.data[3]);
    }
    for (int choice = 0; choice <= p.top_k; ++choice) {
      const int64_t row = rows[choice];
      const int side = choice == p.top_k;
      if (row < 0) continue;
      *reinterpret_cast<uint4*>((side ? p.output[1] : p.output[0]) + row * p.row_bytes + vector * 16) = codes;
      float* scales = side ? p.scale[1] : p.scale[0];
      if (scales == nullptr) continue;
      if (p.format.block_scale) {
        const int64_t stride = side ? p.scale_stride[1] : p.scale_stride[0];
        if (vector % 8 == 0) scales[vector / 8 * stride + row] = scale;
      } else if (vector == 0) {
        scales[row] = scale;
      }
    }
  }
}

struct QuantizeRowsParams {
  const void* input[2];  // [rows, width] 16-bit, routed and shared
  uint8_t* output[2];
  float* scale[2];
  const int32_t* routed_rows;
  int32_t shared_rows;
  int32_t width[2];  // multiples of 32
  int32_t scale_stride[2];
  RowFormat format;
};

// A warp per row.
template <typename Source>
__global__ void __launch_bounds__(256) quantize_rows_kernel(const QuantizeRowsParams p) {
  constexpr int kHeld = 2;  // vectors of a lane that are read once: rows of up to 512
  const int lane = threadIdx.x % 32;
  wait_for_previous_kernel();
  allow_next_kernel();
  const int routed = *p.routed_rows;
  for (int index = blockIdx.x * 8 + threadIdx.x / 32; index < routed + p.shared_rows;
       index += gridDim.x * 8) {
    const bool shared = index >= routed;
    const int64_t row = shared ? index - routed : index,
                  stride = shared ? p.scale_stride[1] : p.scale_stride[0];
    const int width = shared ? p.width[1] : p.width[0], vectors = width / 8;
    const Source* from = static_cast<const Source*>(shared ? p.input[1] : p.input[0]) + row * width;
    uint32_t* codes = reinterpret_cast<uint32_t*>((shared ? p.output[1] : p.output[0]) + row * width);
    float* scales = shared ? p.scale[1] : p.scale[0];
    float scale = p.format.static_scale != nullptr ? *p.format.static_scale : 1.0f;
    const bool dynamic = p.format.static_scale == nullptr;
    for (int base = 0; base < vectors; base += 32 * kHeld) {
      Vec<Source, 8> values[kHeld] = {};
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (base + 32 * i + lane < vectors)
          values[i] = Vec<Source, 8>::load(from + (base + 32 * i + lane) * 8);
      if (dynamic && !p.format.block_scale && base == 0) {
        float absmax = 0.0f;
#pragma unroll
        for (const auto& held : values) absmax = max_or_nan(absmax, absmax_of(held));
        for (int vector = lane + 32 * kHeld; vector < vectors; vector += 32)
          absmax = max_or_nan(absmax, absmax_of(Vec<Source, 8>::load(from + vector * 8)));
        scale = scale_of(warp_max(absmax), p.format.int8);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int vector = base + 32 * i + lane;
        if (dynamic && p.format.block_scale) {  // 16 lanes hold a block
          float absmax = absmax_of(values[i]);
#pragma unroll
          for (int offset = 1; offset < 16; offset *= 2)
            absmax = max_or_nan(absmax, __shfl_xor_sync(0xffffffffu, absmax, offset));
          scale = scale_of(absmax, p.format.int8);
        }
        if (vector >= vectors) continue;
        quantized(values[i], scale, p.format.int8).store(codes + vector * 2);
        if (p.format.block_scale && vector % 16 == 0) scales[vector / 16 * stride + row] = scale;
        if (!p.format.block_scale && vector == 0) scales[row] = scale;
      }
    }
  }
}

struct CombineParams {
  const void* routed;        // [rows, D] 16-bit
  const void* shared;        // [N, D] or null
  const int32_t* pair_rows;  // [N, top_k]
  const float* routing_weights;
  void* output;  // [N, D]
  int32_t hidden_size;
  int32_t top_k;
  int32_t accumulate;
};

// grid: N. Always adds in the order of the choices, the shared expert last.
template <typename Source, typename Output>
__global__ void __launch_bounds__(256, 4) combine_kernel(const CombineParams p) {
  __shared__ int64_t rows[kMaxTopK];
  __shared__ float weights[kMaxTopK];
  constexpr int kAhead = 8;
  const Source* routed = static_cast<const Source*>(p.routed);
  const int64_t token = blockIdx.x;
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x < p.top_k) {
    rows[threadIdx.x] = p.pair_rows[token * p.top_k + threadIdx.x];
    weights[threadIdx.x] = p.routing_weights[token * p.top_k + threadIdx.x];
  }
  __syncthreads();
  for (int channel = threadIdx.x * 8; channel < p.hidden_size; channel += 256 * 8) {
    float sum[8] = {};
    for (int base = 0; base < p.top_k; base += kAhead) {
      uint4 parts[kAhead];  // all on their way before the first is used
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        parts[i] = make_uint4(0, 0, 0, 0);
        if (base + i < p.top_k && rows[base + i] >= 0)
          parts[i] = *reinterpret_cast<const uint4*>(routed + rows[base + i] * p.hidden_size + channel);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const float weight = base + i < p.top_k && rows[base + i] >= 0 ? weights[base + i] : 0.0f;
        const Source* part = reinterpret_cast<const Source*>(&parts[i]);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[c] += weight * to_float(part[c]);
      }
    }
    if (p.shared != nullptr) {
      const auto part =
          Vec<Source, 8>::load(static_cast<const Source*>(p.shared) + token * p.hidden_size + channel);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += to_float(part.data[i]);
    }
    constexpr int kVec = 16 / sizeof(Output);
    Output* to = static_cast<Output*>(p.output) + token * p.hidden_size + channel;
#pragma unroll
    for (int base = 0; base < 8; base += kVec) {
      Vec<Output, kVec> result = {};
      if (p.accumulate) result = Vec<Output, kVec>::load(to + base);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        const float before = p.accumulate ? to_float(result.data[i]) : 0.0f;
        result.data[i] = from_float<Output>(before + sum[base + i]);
      }
      result.store(to + base);
    }
  }
}

}  // namespace ringkernels::grouped
