// The prefill attention for Hopper, head_dim 128: wgmma, one block per SM.
//
// As in prefill.cuh a block has 128 query rows: the query heads of one key head, for 128 / group tokens. One
// warpgroup copies tiles of 128 keys and of 128 values into a ring; two compute, each for 64 rows. Scores are
// accumulated in the layout in which the product with the values takes its left operand, so that they stay in
// registers. While a tile's softmax is computed, the product of the tile before with its values runs.
#pragma once

#include "attention/prefill.cuh"
#include "common/wgmma.cuh"

namespace ringkernels::attention::hopper {

using namespace warpgroup;

constexpr int kDim = 128;
constexpr int kComputeThreads = 256;
constexpr int kThreads = kComputeThreads + 128;
constexpr int kTileKeys = 128;
constexpr int kStages = 6;
constexpr uint32_t kHalfBytes = kTileKeys * 128;  // 128 rows x 64 dimensions
constexpr uint32_t kTileBytes = 2 * kHalfBytes;   // of keys or of values; of the queries, too
constexpr uint32_t kBarriers = (kStages + 1) * kTileBytes;
constexpr size_t kSharedBytes = kBarriers + 2 * kStages * sizeof(uint64_t);
static_assert(kTileKeys == kQueryRows && kSharedBytes <= 227 * 1024, "shared memory of an SM");

#if RING_HAS_WGMMA

// A thread's two rows of the scores or the output of its warpgroup: element i is of column
// 8 (i / 4) + 2 (lane % 4) + i % 2 and of row lane / 4 + 8 (i / 2 % 2) of the warp's 16.
struct Rows {
  float output[kDim / 2];
  float maximum[2];
  float sum[2];  // of this thread's columns

  __device__ __forceinline__ Rows() {
#pragma unroll
    for (float& value : output) value = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) maximum[half] = -INFINITY, sum[half] = 0.0f;
  }

  // Scores become weights. Returns by what is kept of sums and output.
  __device__ __forceinline__ float2 weigh(float (&scores)[kTileKeys / 2], float scale) {
    float kept[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = maximum[half];
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; i += 4)
        largest = fmaxf(largest, fmaxf(scores[i + 2 * half], scores[i + 2 * half + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      kept[half] = power_of_two((maximum[half] - largest) * scale);
      maximum[half] = largest;
      const float offset = largest * scale;
      float added = 0.0f;
#pragma unroll
      for (int i = 0; i < kTileKeys / 2; i += 4) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          scores[i + c] = power_of_two(fmaf(scores[i + c], scale, -offset));
          added += scores[i + c];
        }
      }
      sum[half] = fmaf(sum[half], kept[half], added);
    }
    return {kept[0], kept[1]};
  }
  __device__ __forceinline__ void keep(float2 kept) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) output[i] *= i / 2 % 2 == 0 ? kept.x : kept.y;
  }
};

// The weights of a tile as left operands of the product with its values.
template <typename T>
struct Weights {
  uint32_t parts[kTileKeys / 16][4];

  __device__ __forceinline__ void pack_from(const float (&scores)[kTileKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kTileKeys / 4; ++i) parts[i / 4][i % 4] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }
};

// Keys behind the token of a row get the weight 0.
__device__ __forceinline__ void hide_future(float (&scores)[kTileKeys / 2], int first_key,
                                            const int (&last_key)[2]) {
#pragma unroll
  for (int i = 0; i < kTileKeys / 2; ++i) {
    const int key = first_key + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
    if (key > last_key[i / 2 % 2]) scores[i] = -INFINITY;
  }
}

template <typename T>
__device__ __forceinline__ void start_scores(float (&scores)[kTileKeys / 2],
                                             const uint32_t (&query)[kDim / 16][4], uint32_t keys) {
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    wgmma_registers_rows<T>(scores, query[k], tile_descriptor(keys + k / 4 * kHalfBytes + k % 4 * 32), k > 0);
}

template <typename T>
__device__ __forceinline__ void start_output(float (&output)[kDim / 2], const Weights<T>& weights,
                                             uint32_t values) {
#pragma unroll
  for (int k = 0; k < kTileKeys / 16; ++k)
    wgmma_registers_columns<T>(output, weights.parts[k], tile_descriptor(values + k * 2048, kHalfBytes));
}

// The copying warpgroup: tiles of keys and values in turn.
template <typename T>
__device__ __forceinline__ void copy_tiles(const TileRing<kStages>& ring, uint32_t tiles, const T* keys,
                                           const T* values, int context) {
  const int steps = (context + kTileKeys - 1) / kTileKeys;
  const int unit = threadIdx.x % 16, first = threadIdx.x % 128 / 16;
  ring.produce(2 * steps, [&](int tile, int stage) {
    const int row = tile / 2 * kTileKeys + first;
    const T* source = (tile % 2 == 0 ? keys : values) + unit * 8;
    const uint32_t target =
        tiles + stage * kTileBytes + unit / 8 * kHalfBytes + tile_offset<8>(first, unit % 8);
#pragma unroll
    for (int i = 0; i < kTileKeys / 8; ++i) {
      const bool inside = row + 8 * i < context;
      copy_async(target + i * 1024, source + (inside ? (int64_t)(row + 8 * i) * kDim : 0), inside);
    }
  });
}

// The warpgroup's 64 query rows into shared memory, and this warp's 16 as left operands.
template <typename T>
__device__ __forceinline__ void load_rows(uint32_t (&query)[kDim / 16][4], uint32_t shared,
                                          const AttentionPrefillParams& p, const PrefillTile& tile) {
  const T* from = static_cast<const T*>(p.query) + (int64_t)blockIdx.y * tile.group * kDim;
  const int group = threadIdx.x / 128, unit = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = group * 64 + threadIdx.x % 128 / 16 + 8 * i, token = row / tile.group;
    const bool valid = token < tile.tokens;
    const T* source = from + (tile.token + token) * p.row_stride + row % tile.group * kDim + unit * 8;
    copy_async(shared + unit / 8 * kHalfBytes + tile_offset<8>(row, unit % 8), valid ? source : from, valid);
  }
  copy_commit();
  copy_wait<0>();
  named_barrier(1 + group, 128);
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k)
    Block<8>::rows_as_a(query[k], shared + k / 4 * kHalfBytes, threadIdx.x / 32 * 16, k % 4 * 2);
}

// Divides by the sums and writes the rows of the tile's tokens, through the warp's rows of the queries.
template <typename T>
__device__ __forceinline__ void store_rows(const Rows& rows, uint32_t shared, const AttentionPrefillParams& p,
                                           const PrefillTile& tile) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = rows.sum[half];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    inverse[half] = 1.0f / total;
  }
  __syncwarp();  // all lanes have their queries
#pragma unroll
  for (int i = 0; i < kDim / 4; ++i) {
    const int half = i % 2, unit = i / 2, row = first + lane / 4 + 8 * half;
    const uint32_t packed =
        pack<T>(rows.output[2 * i] * inverse[half], rows.output[2 * i + 1] * inverse[half]);
    const uint32_t address =
        shared + unit / 8 * kHalfBytes + tile_offset<8>(row, unit % 8) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(packed) : "memory");
  }
  __syncwarp();
  T* to = static_cast<T*>(p.output) + (int64_t)blockIdx.y * tile.group * kDim;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = first + 2 * i + lane / 16, unit = lane % 16, token = row / tile.group;
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(shared + unit / 8 * kHalfBytes + tile_offset<8>(row, unit % 8))
                 : "memory");
    if (token >= tile.tokens) continue;
    T* target = to + (tile.token + token) * p.output_row_stride + row % tile.group * kDim + unit * 8;
    *reinterpret_cast<uint4*>(target) = x;
  }
}

// A computing warpgroup: its rows over all tiles of `context` keys.
template <typename T>
__device__ __forceinline__ void compute(Rows& rows, const uint32_t (&query)[kDim / 16][4],
                                        const TileRing<kStages>& ring, uint32_t tiles, int context,
                                        int first_hidden, const int (&last_key)[2], float scale) {
  const int steps = (context + kTileKeys - 1) / kTileKeys;
  const auto at = [&](int tile) { return tiles + tile % kStages * kTileBytes; };
  float scores[kTileKeys / 2];
  Weights<T> weights;
  ring.wait(0);
  wgmma_fence();
  start_scores<T>(scores, query, at(0));
  wgmma_commit();
  wgmma_wait<0>();
  pin(scores);
  ring.release(0);
  if (kTileKeys > first_hidden) hide_future(scores, 0, last_key);
  rows.weigh(scores, scale);
  weights.pack_from(scores);
  for (int step = 1; step < steps; ++step) {
    const int keys = 2 * step, values = 2 * step - 1;  // the keys of this step, the values of the one before
    pin(rows.output);
    ring.wait(keys);
    wgmma_fence();
    start_scores<T>(scores, query, at(keys));
    wgmma_commit();
    ring.wait(values);
    start_output<T>(rows.output, weights, at(values));
    wgmma_commit();
    wgmma_wait<1>();
    pin(scores);
    ring.release(keys);
    if ((step + 1) * kTileKeys > first_hidden) hide_future(scores, step * kTileKeys, last_key);
    const float2 kept = rows.weigh(scores, scale);
    wgmma_wait<0>();
    pin(rows.output);
    ring.release(values);
    rows.keep(kept);
    weights.pack_from(scores);
  }
  pin(rows.output);
  ring.wait(2 * steps - 1);
  wgmma_fence();
  start_output<T>(rows.output, weights, at(2 * steps - 1));
  wgmma_commit();
  wgmma_wait<0>();
  pin(rows.output);
}

#endif  // RING_HAS_WGMMA

// grid: (tiles of tokens, KV, B)
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ AttentionPrefillParams p) {
#if RING_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t hopper_shared[];
  wait_for_previous_kernel();
  allow_next_kernel();
  const PrefillTile tile = find_tile(p);
  if (tile.tokens == 0) return;
  const uint32_t queries = mma_tile::shared_address(hopper_shared), tiles = queries + kTileBytes;
  const TileRing<kStages> ring = {queries + kBarriers, queries + kBarriers + 8 * kStages};
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(ring.full + 8 * i, 128);
      barrier_init(ring.empty + 8 * i, kComputeThreads / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int context = min(tile.position + tile.first + tile.tokens, (int)p.capacity);
  if (threadIdx.x >= kComputeThreads) {
    give_registers<40>();
    const int64_t head = ((int64_t)tile.slot * p.num_kv_heads + blockIdx.y) * p.capacity * kDim;
    copy_tiles(ring, tiles, static_cast<const T*>(p.key_cache) + head,
               static_cast<const T*>(p.value_cache) + head, context);
  } else {
    take_registers<232>();
    uint32_t query[kDim / 16][4];
    load_rows<T>(query, queries, p, tile);
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
    const int last_key[2] = {tile.last_key(row), tile.last_key(row + 8)};
    Rows rows;
    compute<T>(rows, query, ring, tiles, context, tile.position + tile.first, last_key,
               p.softmax_scale * 1.44269504f);  // log2(e)
    store_rows<T>(rows, queries, p, tile);
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // the host launches prefill.cuh's
#endif
}

}  // namespace ringkernels::attention::hopper
