// Flash-decoding: a block reads its part of the context of one (row, kv head) once for all query heads of the
// group; the last block of the pair adds the parts up in a fixed order.
#pragma once

#include "attention/decode_split.h"
#include "attention/decode_tile.cuh"
#include "common/launch.cuh"
#include "common/vec.cuh"
#include "ringkernels/attention.h"

namespace ringkernels::attention {

constexpr int kThreads = kWarps * 32;
constexpr int kSlots = 3;  // 4 KB each, of keys and values in turn: 2 are in flight while one is used
constexpr float kLog2e = 1.4426950408889634f;

// Shared memory of a block. The queues of the warps are reused for their results, and by the block that
// combines.
template <typename T>
struct Layout {
  static constexpr int kRows = T::kWide ? 16 : 8;
  static constexpr int kQueryStride = T::kHeadDim + 8;  // rows land in different banks
  typename T::Mma query[kRows * kQueryStride];
  alignas(16) typename T::Cache new_key[T::kHeadDim];
  alignas(16) typename T::Cache new_value[T::kHeadDim];
  float scratch[kWarps][T::kHeadDim];
  float maximum[kWarps][kRows];
  float total[kWarps][kRows];
  float row_total[kRows];
  int is_last;
  // Copies run at half their speed if lines of the cache are not lines of shared memory.
  union {
    alignas(128) uint8_t slots[kWarps][kSlots][T::kSlotBytes];
    float output[kWarps * kRows * T::kHeadDim];  // [kWarps, group, kHeadDim]
    struct {
      float weights[kRows * kMaxSplits];  // [group, splits]
      alignas(16) float4 parts[kThreads];
    } combine;
  };
};

template <typename Cache>
__device__ __forceinline__ Cache to_cache(float value, float scale) {
  if constexpr (sizeof(Cache) == 1) {
    Cache code;
    code.__x = to_fp8_e4m3(value / scale);
    return code;
  } else {
    return from_float<Cache>(value);
  }
}

// What a block does with the new token besides attending: each of the group's query heads is a job of one
// warp, and in the block that owns the new token its key and its value.
enum class Job { kQuery, kKey, kValue };

// Inputs of a job, lane + 32 i. They are loaded before the cache, which would delay them by a queue of
// copies.
template <int kPer>
struct Head {
  float x[kPer], weight[kPer], cosine[kPer], sine[kPer];
};

// The tables of a head: what does not come from the kernel ahead.
template <typename T>
__device__ __forceinline__ void load_tables(Head<T::kHeadDim / 32>& head, const AttentionDecodeParams& p,
                                            Job job, int position, int lane) {
  const float* norm = job == Job::kQuery ? p.query_norm : job == Job::kKey ? p.key_norm : nullptr;
  const int half = p.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < T::kHeadDim / 32; ++i) {
    const int dim = lane + 32 * i;
    head.weight[i] = norm != nullptr ? norm[dim] : 1.0f;
    const bool rotates = job != Job::kValue && p.rotary_cos != nullptr && dim < p.rotary_dim;
    const int64_t entry = static_cast<int64_t>(position) * half + (dim < half ? dim : dim - half);
    head.cosine[i] = rotates ? p.rotary_cos[entry] : 1.0f;
    head.sine[i] = rotates ? p.rotary_sin[entry] : 0.0f;
  }
}

template <typename T, typename Act>
__device__ __forceinline__ void load_head(Head<T::kHeadDim / 32>& head, const AttentionDecodeParams& p,
                                          Job job, int row, int index, int lane) {
  const void* from = job == Job::kQuery ? p.query : job == Job::kKey ? p.key : p.value;
  const Act* x = static_cast<const Act*>(from) + row * p.row_stride + index * T::kHeadDim;
#pragma unroll
  for (int i = 0; i < T::kHeadDim / 32; ++i) head.x[i] = to_float(x[lane + 32 * i]);
}

// scratch: [kHeadDim] of this warp.
template <int kPer>
__device__ __forceinline__ void norm_and_rotate(Head<kPer>& head, const AttentionDecodeParams& p, bool norm,
                                                float* scratch, int lane) {
  if (norm) {
    float squares = 0.0f;
#pragma unroll
    for (float x : head.x) squares += x * x;
    const float factor = rsqrtf(warp_sum(squares) / (32 * kPer) + p.norm_eps);
#pragma unroll
    for (int i = 0; i < kPer; ++i) head.x[i] = head.x[i] * factor * head.weight[i];
  }
  if (p.rotary_cos == nullptr) return;
#pragma unroll
  for (int i = 0; i < kPer; ++i) scratch[lane + 32 * i] = head.x[i];
  __syncwarp();
  const int half = p.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int dim = lane + 32 * i;
    if (dim < p.rotary_dim) {
      const float other = scratch[dim < half ? dim + half : dim - half];
      head.x[i] = head.x[i] * head.cosine[i] + (dim < half ? -other : other) * head.sine[i];
    }
  }
  __syncwarp();
}

__device__ __forceinline__ Job job_of(int index, int group) {
  return index < group ? Job::kQuery : index == group ? Job::kKey : Job::kValue;
}

// index: which query head of the group, for a query.
template <typename T>
__device__ __forceinline__ void finish_head(Layout<T>& shared, Head<T::kHeadDim / 32>& head,
                                            const AttentionDecodeParams& p, Job job, int index,
                                            typename T::Cache* new_key_row, typename T::Cache* new_value_row,
                                            int lane) {
  using Cache = typename T::Cache;
  constexpr int kPer = T::kHeadDim / 32;
  const float* norm = job == Job::kQuery ? p.query_norm : p.key_norm;
  if (job != Job::kValue) norm_and_rotate(head, p, norm != nullptr, shared.scratch[threadIdx.x / 32], lane);
  if (job == Job::kQuery) {
#pragma unroll
    for (int i = 0; i < kPer; ++i)
      shared.query[index * Layout<T>::kQueryStride + lane + 32 * i] = from_float<typename T::Mma>(head.x[i]);
    return;
  }
  const float* scale_of_cache = job == Job::kKey ? p.key_scale : p.value_scale;
  const float scale = T::kFp8 && scale_of_cache != nullptr ? *scale_of_cache : 1.0f;
  Cache* to = job == Job::kKey ? new_key_row : new_value_row;
  Cache* to_shared = job == Job::kKey ? shared.new_key : shared.new_value;
#pragma unroll
  for (int i = 0; i < kPer; ++i)
    to[lane + 32 * i] = to_shared[lane + 32 * i] = to_cache<Cache>(head.x[i], scale);
}

// What a warp keeps of the tokens that it has seen. Maximum and total are of the heads g (+ 8), the output is
// of 2 t + c (+ 8), as the two products have them.
template <typename T>
struct Running {
  float output[T::kHeadDim / 16][4 * T::kHeadTiles];
  float maximum[T::kHeadTiles];
  float total[T::kHeadTiles];  // of this lane's tokens only

  __device__ __forceinline__ Running() {
#pragma unroll
    for (auto& tile : output)
#pragma unroll
      for (float& value : tile) value = 0.0f;
#pragma unroll
    for (int h = 0; h < T::kHeadTiles; ++h) {
      maximum[h] = -INFINITY;
      total[h] = 0.0f;
    }
  }

  // Scores (in units of log 2) become weights relative to the new maximum; what was summed before is
  // rescaled.
  __device__ __forceinline__ void update(float (&s)[2 * T::kSteps][4], int lane) {
    bool changed = false;
    float factor[T::kHeadTiles];
#pragma unroll
    for (int h = 0; h < T::kHeadTiles; ++h) {
      float largest = maximum[h];
#pragma unroll
      for (auto& pair : s) largest = fmaxf(largest, fmaxf(pair[2 * h], pair[2 * h + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      changed |= largest != maximum[h];
      factor[h] = exp2f(maximum[h] - largest);
      maximum[h] = largest;
      float sum = 0.0f;
#pragma unroll
      for (auto& pair : s)
#pragma unroll
        for (int c = 0; c < 2; ++c) sum += pair[2 * h + c] = exp2f(pair[2 * h + c] - largest);
      total[h] = total[h] * factor[h] + sum;
    }
    if (!__any_sync(0xffffffffu, changed)) return;
#pragma unroll
    for (int h = 0; h < T::kHeadTiles; ++h) {
      const float first = __shfl_sync(0xffffffffu, factor[h], (lane & 3) * 8);
      const float second = __shfl_sync(0xffffffffu, factor[h], (lane & 3) * 8 + 4);
#pragma unroll
      for (auto& tile : output)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          tile[4 * h + 2 * i] *= first;
          tile[4 * h + 2 * i + 1] *= second;
        }
    }
  }
};

template <typename T>
__device__ __forceinline__ void store_warp(Layout<T>& shared, Running<T>& running, int group) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < T::kHeadTiles; ++h) {
    float total = running.total[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    if (lane % 4 == 0) {
      shared.maximum[warp][(lane >> 2) + 8 * h] = running.maximum[h];
      shared.total[warp][(lane >> 2) + 8 * h] = total;
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = 2 * (lane & 3) + c + 8 * h;
      if (head >= group) continue;
      float* to = shared.output + (warp * group + head) * T::kHeadDim;
#pragma unroll
      for (int load = 0; load < T::kValueLoads; ++load)
#pragma unroll
        for (int j = 0; j < T::kValueVec / 2; ++j) {
          const auto& tile = running.output[load * (T::kValueVec / 2) + j];
          *reinterpret_cast<float2*>(to + T::value_dim(lane, load) + 2 * j) =
              make_float2(tile[4 * h + c], tile[4 * h + 2 + c]);
        }
    }
  }
}

struct Workspace {
  int* counters;   // [pairs], zero between launches
  float2* maxima;  // [pairs, splits, group]: maximum and total
  float* outputs;  // [pairs, splits, group, kHeadDim], relative to the maximum
};

// Adds up the splits of one pair, always in the same order. The first parts are on their way while the
// weights of the splits are found: this is the tail of every launch.
template <typename T, typename Act>
__device__ __forceinline__ void combine(Layout<T>& shared, const AttentionDecodeParams& p,
                                        const float2* maxima, const float* outputs, Act* output, int splits,
                                        float value_scale) {
  constexpr int kAhead = 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = p.num_heads / p.num_kv_heads;
  float* weights = shared.combine.weights;
  const int vectors = group * T::kHeadDim / 4;
  const int shares = max(1, kThreads / vectors);  // threads per vector, each with every shares-th split
  const int share = vectors < kThreads ? threadIdx.x / vectors : 0;
  const float4* from = reinterpret_cast<const float4*>(outputs);
  for (int base = 0; base < vectors; base += kThreads) {
    const int vector = vectors < kThreads ? threadIdx.x % vectors : base + threadIdx.x;
    const bool works = share < shares && vector < vectors;
    const auto load = [&](int split) {
      return works && split < splits ? __ldcg(from + static_cast<int64_t>(split) * vectors + vector)
                                     : float4{};
    };
    float4 ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load(share + i * shares);
    for (int head = warp; base == 0 && head < group; head += kWarps) {
      float2 entries[kMaxSplits / 32];
      float largest = -INFINITY, total = 0.0f;
#pragma unroll
      for (int i = 0; i < kMaxSplits / 32; ++i) {
        const int split = lane + 32 * i;
        entries[i] = split < splits ? __ldcg(&maxima[split * group + head]) : make_float2(-INFINITY, 0.0f);
      }
#pragma unroll
      for (const float2& entry : entries) largest = fmaxf(largest, entry.x);
      largest = warp_max(largest);
#pragma unroll
      for (int i = 0; i < kMaxSplits / 32; ++i) {
        const float weight = exp2f(entries[i].x - largest);
        if (lane + 32 * i < splits) weights[head * splits + lane + 32 * i] = weight;
        total += weight * entries[i].y;
      }
      total = warp_sum(total);
      if (lane == 0) shared.row_total[head] = value_scale / total;
    }
    __syncthreads();
    const int head = vector * 4 / T::kHeadDim;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int split = share; works && split < splits; split += kAhead * shares) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (split + i * shares >= splits) break;
        const float weight = weights[head * splits + split + i * shares];
        sum.x += weight * ahead[i].x, sum.y += weight * ahead[i].y;
        sum.z += weight * ahead[i].z, sum.w += weight * ahead[i].w;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) ahead[i] = load(split + (kAhead + i) * shares);
    }
    shared.combine.parts[threadIdx.x] = sum;
    __syncthreads();
    if (share == 0 && vector < vectors) {
      for (int other = 1; other < shares; ++other) {
        const float4 part = shared.combine.parts[other * vectors + vector];
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      const float scale = shared.row_total[head];
      Vec<Act, 4>{{from_float<Act>(sum.x * scale), from_float<Act>(sum.y * scale),
                   from_float<Act>(sum.z * scale), from_float<Act>(sum.w * scale)}}
          .store(output + vector * 4);
    }
    __syncthreads();
  }
}

// grid: (splits, kv heads, rows).
template <typename T, typename Act>
__global__ void __launch_bounds__(kThreads, T::kWide ? 1 : kBlocksPerMultiprocessor)
    decode_kernel(const AttentionDecodeParams p, const Workspace workspace) {
  using Cache = typename T::Cache;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  Layout<T>& shared = *reinterpret_cast<Layout<T>*>(shared_memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int splits = gridDim.x, split = blockIdx.x, kv_head = blockIdx.y, row = blockIdx.z;
  const int group = p.num_heads / p.num_kv_heads;
  if (!p.cache_settled) wait_for_previous_kernel();
  const int position = p.position[row];
  const int slot = p.slots != nullptr ? p.slots[row] : row;
  const int tiles = position / T::kTokens + 1;
  const SplitRange range = split_range(tiles, splits);
  if (slot < 0 || position < 0 || position >= p.capacity || split >= range.count) {
    if (p.cache_settled) wait_for_previous_kernel();  // this kernel must not end before the one ahead
    return;
  }
  const int first_tile = split * range.chunk, end_tile = min(first_tile + range.chunk, tiles);
  const bool owner = split == range.count - 1;

  const int64_t cache_offset =
      (static_cast<int64_t>(slot) * p.num_kv_heads + kv_head) * p.capacity * T::kHeadDim;
  Cache* keys = static_cast<Cache*>(p.key_cache) + cache_offset;
  Cache* values = static_cast<Cache*>(p.value_cache) + cache_offset;
  Running<T> running;
  constexpr int kTileElements = T::kTokens * T::kHeadDim;
  const int last = position % T::kTokens;  // in the newest tile
  // Part 2 i is the keys of the warp's tile i, part 2 i + 1 its values. Groups of copies are closed even when
  // empty.
  const auto copy = [&](int part) {
    const int index = first_tile + warp + part / 2 * kWarps;
    if (index < end_tile) {
      const int64_t offset = static_cast<int64_t>(index) * kTileElements;
      const int limit = index == tiles - 1 ? last : T::kTokens;
      uint8_t* slot = shared.slots[warp][part % kSlots];
      if (part % 2 == 0) {
        T::template copy<false>(slot, keys + offset, limit, lane);
      } else {
        T::template copy<true>(slot, values + offset, limit, lane);
      }
    }
    close_copies();
  };
  const int jobs = group + (owner ? 2 : 0);
  const auto load_job = [&](Head<T::kHeadDim / 32>& head, int job) {
    const int index = job < group ? kv_head * group + job : kv_head;
    load_head<T, Act>(head, p, job_of(job, group), row, index, lane);
  };
  Head<T::kHeadDim / 32> head;
  if (warp < jobs) load_tables<T>(head, p, job_of(warp, group), position, lane);
#pragma unroll
  for (int part = 0; part < kSlots; ++part) copy(part);
  if (p.cache_settled) wait_for_previous_kernel();
  if (warp < jobs) load_job(head, warp);
  const int64_t new_token = static_cast<int64_t>(position) * T::kHeadDim;
  for (int job = warp; job < jobs; job += kWarps) {
    if (job >= kWarps) {
      load_tables<T>(head, p, job_of(job, group), position, lane);
      load_job(head, job);
    }
    finish_head<T>(shared, head, p, job_of(job, group), job, keys + new_token, values + new_token, lane);
  }
  for (int i = threadIdx.x; i < (Layout<T>::kRows - group) * T::kHeadDim;
       i += kThreads)  // heads that do not exist
    shared.query[(group + i / T::kHeadDim) * Layout<T>::kQueryStride + i % T::kHeadDim] =
        typename T::Mma(0.0f);
  __syncthreads();
  uint32_t query[T::kHeadDim / 16][T::kQueryRegs];
  T::load_query(query, shared.query, Layout<T>::kQueryStride, lane);
  const float score_scale =
      p.softmax_scale * kLog2e * (T::kFp8 && p.key_scale != nullptr ? *p.key_scale : 1.0f);

  for (int index = first_tile + warp, part = 0; index < end_tile; index += kWarps, part += 2) {
    const bool newest = index == tiles - 1;
    uint8_t* key_slot = shared.slots[warp][part % kSlots];
    uint8_t* value_slot = shared.slots[warp][(part + 1) % kSlots];
    float s[2 * T::kSteps][4];
    wait_for_copies<kSlots - 1>();
    __syncwarp();
    if (newest) T::template patch<false>(key_slot, shared.new_key, last, lane);
    T::scores(s, key_slot, query, lane);
    __syncwarp();
    copy(part + kSlots);
#pragma unroll
    for (int pair = 0; pair < 2 * T::kSteps; ++pair)
#pragma unroll
      for (int r = 0; r < 2 * T::kHeadTiles; ++r) {
        const int token = T::value_token(lane, pair / 2, 2 * (pair % 2) + r % 2);
        s[pair][r] = newest && token > last ? -INFINITY : s[pair][r] * score_scale;
      }
    running.update(s, lane);
    wait_for_copies<kSlots - 1>();
    __syncwarp();
    if (newest) T::template patch<true>(value_slot, shared.new_value, last, lane);
    T::accumulate(running.output, value_slot, s, lane);
    __syncwarp();
    copy(part + 1 + kSlots);
  }
  allow_next_kernel();
  __syncthreads();  // the queues become `output`
  store_warp<T>(shared, running, group);
  __syncthreads();

  const float value_scale = T::kFp8 && p.value_scale != nullptr ? *p.value_scale : 1.0f;
  const int pair = row * p.num_kv_heads + kv_head;
  const int64_t part = static_cast<int64_t>(pair) * splits + split;
  Act* output = static_cast<Act*>(p.output) + row * p.output_row_stride + kv_head * group * T::kHeadDim;
  for (int element = threadIdx.x; element < group * T::kHeadDim; element += kThreads) {
    const int head = element / T::kHeadDim;
    float largest = -INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) largest = fmaxf(largest, shared.maximum[w][head]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(shared.maximum[w][head] - largest);
      total += weight * shared.total[w][head];
      sum += weight * shared.output[w * group * T::kHeadDim + element];
    }
    if (range.count == 1) {
      output[element] = from_float<Act>(sum * (value_scale / total));
    } else {
      workspace.outputs[part * group * T::kHeadDim + element] = sum;
      if (element % T::kHeadDim == 0) workspace.maxima[part * group + head] = make_float2(largest, total);
    }
  }
  if (range.count == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const int before = atomicAdd(workspace.counters + pair, 1);
    shared.is_last = before == range.count - 1;
    if (shared.is_last) workspace.counters[pair] = 0;
  }
  __syncthreads();
  if (!shared.is_last) return;
  __threadfence();
  const int64_t first_part = static_cast<int64_t>(pair) * splits;
  combine<T, Act>(shared, p, workspace.maxima + first_part * group,
                  workspace.outputs + first_part * group * T::kHeadDim, output, range.count, value_scale);
}

template <typename Act, typename Cache, int kHeadDim, bool kWide>
Status launch_decode(const AttentionDecodeParams& p, const Workspace& workspace, int splits, Stream stream) {
  using T = Tile<Cache, kHeadDim, kWide>;
  LaunchShape shape;
  shape.grid = dim3(splits, p.num_kv_heads, p.batch);
  shape.block = dim3(kThreads);
  shape.shared_bytes = sizeof(Layout<T>);
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  return launch_kernel(decode_kernel<T, Act>, shape, p, workspace);
}

// One translation unit per activation dtype: see decode_<dtype>.cu.
template <typename Act, typename Cache>
Status dispatch_decode(const AttentionDecodeParams& p, const Workspace& workspace, int splits,
                       Stream stream) {
  const bool wide = p.num_heads / p.num_kv_heads > 8;
  if (p.head_dim == 64) {
    return wide ? launch_decode<Act, Cache, 64, true>(p, workspace, splits, stream)
                : launch_decode<Act, Cache, 64, false>(p, workspace, splits, stream);
  }
  return wide ? launch_decode<Act, Cache, 128, true>(p, workspace, splits, stream)
              : launch_decode<Act, Cache, 128, false>(p, workspace, splits, stream);
}

}  // namespace ringkernels::attention
