// Causal attention of many new tokens of a row over its cache, on any GPU from sm_80 on (mma.sync);
// prefill_hopper.cuh has another way for sm_90.
//
// A block has 128 query rows: the query heads of one key head, for 128 / group tokens, so that keys and
// values are read once for all of them. Each of 8 warps owns 16 of the rows; keys and values go by in tiles of
// 64 tokens, two tiles in shared memory. Softmax as it goes, in fp32, by powers of two.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "common/mma_tile.cuh"
#include "ringkernels/attention.h"

namespace ringkernels::attention {

using namespace mma_tile;

constexpr int kPrefillWarps = 8;
constexpr int kPrefillThreads = kPrefillWarps * 32;
constexpr int kQueryRows = kPrefillWarps * 16;
constexpr int kKeyTokens = 64;

template <int kDim>
constexpr int prefill_shared_bytes() {
  return 2 * 2 * kKeyTokens * kDim * 2;  // two tiles of keys and of values; the queries are there before them
}

// What a block works on: `tokens` tokens of a row, from `first` on.
struct PrefillTile {
  int slot, position, first, tokens, group;
  int64_t token;  // the first one in N

  // The last key that query row `row` sees; rows behind the last token repeat it.
  __device__ __forceinline__ int last_key(int row) const {
    return position + first + min(row / group, tokens - 1);
  }
};

// tokens is 0 where there is nothing to do. Long tiles come first.
__device__ __forceinline__ PrefillTile find_tile(const AttentionPrefillParams& p) {
  const int row = blockIdx.z;
  PrefillTile tile;
  tile.group = p.num_heads / p.num_kv_heads;
  const int tile_tokens = kQueryRows / tile.group;
  tile.slot = p.slots == nullptr ? row : p.slots[row];
  tile.first = (gridDim.x - 1 - blockIdx.x) * tile_tokens;
  tile.position = p.position[row];
  const int length = min(p.lengths[row], p.max_length);
  tile.tokens = tile.slot < 0 || tile.position < 0 ? 0 : max(0, min(tile_tokens, length - tile.first));
  tile.token = (p.starts == nullptr ? (int64_t)row * p.max_length : p.starts[row]) + tile.first;
  return tile;
}

// Copies kKeyTokens rows [kDim] of the cache; rows from `valid` on become zero.
template <typename T, int kDim>
__device__ __forceinline__ void copy_tile(uint32_t target, const T* source, int valid) {
  constexpr int kUnits = kDim / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kKeyTokens * kUnits; i += kPrefillThreads) {
    const int row = i / kUnits, unit = i % kUnits;
    copy_async(target + tile_offset<kUnits>(row, unit), source + (row < valid ? row * kDim + unit * 8 : 0),
               row < valid);
  }
}

// query rows [kQueryRows, kDim] into shared memory, and a warp's 16 of them into registers.
template <typename T, int kDim>
__device__ __forceinline__ void load_queries(uint32_t (&query)[kDim / 16][4], uint32_t shared,
                                             const AttentionPrefillParams& p, const PrefillTile& tile) {
  constexpr int kUnits = kDim / 8;
  const T* from = static_cast<const T*>(p.query) + (int64_t)blockIdx.y * tile.group * kDim;
  for (int i = threadIdx.x; i < kQueryRows * kUnits; i += kPrefillThreads) {
    const int row = i / kUnits, unit = i % kUnits, token = row / tile.group, head = row % tile.group;
    const bool valid = token < tile.tokens;
    const T* source = from + (tile.token + token) * p.row_stride + head * kDim + unit * 8;
    copy_async(shared + tile_offset<kUnits>(row, unit), valid ? source : from, valid);
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    Block<kUnits>::rows_as_a(query[k], shared, threadIdx.x / 32 * 16, 2 * k);
  __syncthreads();
}

// 2^x for x <= 0, one instruction; 2^-infinity is 0.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The running softmax of a warp's 16 rows: a thread has rows lane / 4 and lane / 4 + 8.
template <int kDim>
struct PrefillRows {
  float output[kDim / 8][4] = {};  // row + 8 (i / 2), dim 8 n + 2 (lane % 4) + i % 2
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // of this thread's columns

  // scores: of 64 keys, in the place of `output`; they become weights. scale: of the scores, times log2(e).
  __device__ __forceinline__ void weigh(float (&scores)[kKeyTokens / 8][4], float scale) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
#pragma unroll
      for (const auto& score : scores)
        largest = fmaxf(largest, fmaxf(score[2 * half], score[2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float kept = power_of_two((maximum[half] - largest) * scale), offset = largest * scale;
      maximum[half] = largest;
      sum[half] *= kept;
#pragma unroll
      for (auto& score : scores) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          score[i] = power_of_two(fmaf(score[i], scale, -offset));
          sum[half] += score[i];
        }
      }
#pragma unroll
      for (auto& values : output) values[2 * half] *= kept, values[2 * half + 1] *= kept;
    }
  }

  // output += weights x values.
  template <typename T>
  __device__ __forceinline__ void add(const float (&weights)[kKeyTokens / 8][4], uint32_t values) {
#pragma unroll
    for (int k = 0; k < kKeyTokens / 16; ++k) {
      const float (&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                             pack<T>(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        Block<kDim / 8>::columns_as_b(b, values, 16 * k, 2 * n);
        mma<T>(output[2 * n], a, b[0], b[1]);
        mma<T>(output[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  // Divides by the sums and writes the rows of the tile's tokens, through the warp's part of shared memory.
  template <typename T>
  __device__ __forceinline__ void store(uint8_t* shared, const AttentionPrefillParams& p,
                                        const PrefillTile& tile) {
    constexpr int kUnits = kDim / 8;
    const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(0xffffffffu, total, 1);
      total += __shfl_xor_sync(0xffffffffu, total, 2);
      const float inverse = 1.0f / total;
      const int row = first_row + lane / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < kUnits; ++n) {
        *reinterpret_cast<uint32_t*>(shared + tile_offset<kUnits>(row, n) + lane % 4 * 4) =
            pack<T>(output[n][2 * half] * inverse, output[n][2 * half + 1] * inverse);
      }
    }
    __syncwarp();
    T* to = static_cast<T*>(p.output) + (int64_t)blockIdx.y * tile.group * kDim;
    for (int i = lane; i < 16 * kUnits; i += 32) {
      const int row = first_row + i / kUnits, unit = i % kUnits, token = row / tile.group;
      if (token >= tile.tokens) continue;
      T* target = to + (tile.token + token) * p.output_row_stride + row % tile.group * kDim + unit * 8;
      *reinterpret_cast<uint4*>(target) =
          *reinterpret_cast<const uint4*>(shared + tile_offset<kUnits>(row, unit));
    }
  }
};

// scores[n]: the warp's 16 rows times keys 8 n to 8 n + 7.
template <typename T, int kDim>
__device__ __forceinline__ void multiply_keys(float (&scores)[kKeyTokens / 8][4],
                                              const uint32_t (&query)[kDim / 16][4], uint32_t keys) {
#pragma unroll
  for (auto& score : scores) score[0] = score[1] = score[2] = score[3] = 0.0f;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
#pragma unroll
    for (int n = 0; n < kKeyTokens / 16; ++n) {
      uint32_t b[4];
      Block<kDim / 8>::rows_as_b(b, keys, 16 * n, 2 * k);
      mma<T>(scores[2 * n], query[k], b[0], b[1]);
      mma<T>(scores[2 * n + 1], query[k], b[2], b[3]);
    }
  }
}

// Keys behind the token of a row get the weight 0.
__device__ __forceinline__ void hide_future(float (&scores)[kKeyTokens / 8][4], int first_key,
                                            const int (&last_key)[2]) {
#pragma unroll
  for (int n = 0; n < kKeyTokens / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first_key + 8 * n + threadIdx.x % 4 * 2 + i % 2 > last_key[i / 2]) scores[n][i] = -INFINITY;
}

// grid: (tiles of tokens, KV, B)
template <typename T, int kDim>
__global__ void __launch_bounds__(kPrefillThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionPrefillParams p) {
  constexpr uint32_t kTileBytes = kKeyTokens * kDim * sizeof(T);
  extern __shared__ __align__(128) uint8_t prefill_shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  const PrefillTile tile = find_tile(p);
  if (tile.tokens == 0) return;
  const uint32_t keys = shared_address(prefill_shared), values = keys + 2 * kTileBytes;
  uint32_t query[kDim / 16][4];
  load_queries<T, kDim>(query, keys, p, tile);

  const int64_t head = ((int64_t)tile.slot * p.num_kv_heads + blockIdx.y) * p.capacity * kDim;
  const T* key_cache = static_cast<const T*>(p.key_cache) + head;
  const T* value_cache = static_cast<const T*>(p.value_cache) + head;
  const int context = min(tile.position + tile.first + tile.tokens, (int)p.capacity);
  const int steps = (context + kKeyTokens - 1) / kKeyTokens;
  const auto copy = [&](int step) {
    const int64_t from = (int64_t)step * kKeyTokens * kDim;
    const int valid = min(kKeyTokens, context - step * kKeyTokens);
    copy_tile<T, kDim>(keys + step % 2 * kTileBytes, key_cache + from, valid);
    copy_tile<T, kDim>(values + step % 2 * kTileBytes, value_cache + from, valid);
    copy_commit();
  };
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const int last_key[2] = {tile.last_key(row), tile.last_key(row + 8)};
  const float scale = p.softmax_scale * 1.44269504f;  // log2(e)
  PrefillRows<kDim> rows;
  copy(0);
  for (int step = 0; step < steps; ++step) {
    copy_wait<0>();
    __syncthreads();  // this tile has arrived for all, and nobody reads the other one any more
    if (step + 1 < steps) copy(step + 1);
    float scores[kKeyTokens / 8][4];
    multiply_keys<T, kDim>(scores, query, keys + step % 2 * kTileBytes);
    if ((step + 1) * kKeyTokens > tile.position + tile.first)
      hide_future(scores, step * kKeyTokens, last_key);
    rows.weigh(scores, scale);
    rows.template add<T>(scores, values + step % 2 * kTileBytes);
  }
  __syncthreads();
  rows.template store<T>(prefill_shared, p, tile);
}

}  // namespace ringkernels::attention
