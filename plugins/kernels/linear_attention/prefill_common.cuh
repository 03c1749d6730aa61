// What the prefill kernels share: the plan, tiles in shared memory, tensor-core instructions.
//
// A row is cut into segments so that one sequence fills the GPU. Three kernels run one after the other:
//   segment_kernel: what each segment adds to the state, of its last tokens where the decay forgets the rest
//   scan_kernel: the state at the start of each segment
//   chunk_kernel: outputs and final state, chunk by chunk
// With one segment per row only the last one runs. Every exponent is <= 0.
#pragma once

#include <cstdint>

#include "common/launch.cuh"
#include "common/mma_tile.cuh"
#include "common/vec.cuh"
#include "ringkernels/linear_attention.h"

namespace ringkernels {
namespace linear_attention {

using namespace mma_tile;

constexpr int kChunk = 64;  // tokens
constexpr int kWarps = 4;   // of the kernels for any GPU
constexpr int kThreads = kWarps * 32;

// The parameters, and how rows are cut.
struct PrefillArgs {
  LinearAttentionPrefillParams params;
  int32_t segments;        // of the longest row
  int32_t segment_tokens;  // a multiple of kChunk
  int32_t shares;          // blocks of segment_kernel
};

// Where a row is. A row without work has length 0.
struct Row {
  int64_t first;   // token in N
  int32_t length;  // tokens
  int32_t slot;
};

__device__ __forceinline__ Row locate_row(const LinearAttentionPrefillParams& params, int row) {
  Row found;
  found.slot = params.slots == nullptr ? row : params.slots[row];
  // The grid and the workspace are those of max_length.
  found.length = found.slot < 0 ? 0 : min(params.lengths[row], params.max_length);
  found.first = params.starts == nullptr ? (int64_t)row * params.max_length : params.starts[row];
  return found;
}

// The workspace: states at the start of every segment, then what every run adds.
template <int kDim>
__device__ __forceinline__ float* segment_state(const PrefillArgs& args, int segment, int head, int row) {
  const int64_t index = ((int64_t)row * args.params.num_heads + head) * args.segments + segment;
  return static_cast<float*>(args.params.workspace) + index * kDim * kDim;
}

template <int kDim>
__device__ __forceinline__ float* run_state(const PrefillArgs& args, int slot) {
  return segment_state<kDim>(args, 0, 0, args.params.batch) + (int64_t)slot * kDim * kDim;
}

// Tokens at the end of a segment that decide the state after it, in whole chunks. A token that has decayed
// below 2^-32 of a fresh one cannot change an fp32 sum of 24 bits.
__device__ __forceinline__ int remembered_tokens(float log_decay, int segment_tokens) {
  constexpr float kNegligible = 22.18f;                 // -log(2^-32)
  const float tokens = kNegligible / fabsf(log_decay);  // infinite without decay
  return tokens < segment_tokens ? min(((int)tokens / kChunk + 1) * kChunk, segment_tokens) : segment_tokens;
}

// Copies kChunk rows of a head into a tile; rows from `valid` on become zero.
template <typename T, int kDim>
__device__ __forceinline__ void load_tile(uint32_t tile, const T* source, int64_t row_stride, int valid) {
  constexpr int kUnits = kDim / 8;
  constexpr int kRowsAtOnce = kThreads / kUnits;
  const int unit = threadIdx.x % kUnits, first = threadIdx.x / kUnits;
#pragma unroll
  for (int i = 0; i < kChunk / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce;
    const T* address = source + (row < valid ? row : 0) * row_stride + unit * 8;
    copy_async(tile + tile_offset<kUnits>(row, unit), address, row < valid);
  }
}

// The weights of two tokens, each the sum of a high and a low part in T.
struct SplitWeights {
  uint32_t high, low;
};

template <typename T>
__device__ __forceinline__ SplitWeights split_weights(float first, float second) {
  SplitWeights split;
  split.high = pack<T>(first, second);
  const T* high = reinterpret_cast<const T*>(&split.high);
  split.low = pack<T>(first - to_float(high[0]), second - to_float(high[1]));
  return split;
}

// x * weights as high + low. One part alone would put the error of T into the fp32 state.
template <typename T>
__device__ __forceinline__ void weigh(uint32_t packed, const SplitWeights& weights, uint32_t& high,
                                      uint32_t& low) {
  using P = typename Pair<T>::type;
  const P x = *reinterpret_cast<const P*>(&packed);
  const P weight = *reinterpret_cast<const P*>(&weights.high);
  const P product = __hmul2(x, weight);
  const P rest = __hfma2(x, weight, __hneg2(product));  // exact
  const P sum = __hfma2(x, *reinterpret_cast<const P*>(&weights.low), rest);
  high = *reinterpret_cast<const uint32_t*>(&product);
  low = *reinterpret_cast<const uint32_t*>(&sum);
}

// ---- the state

// The part of the state of one of kWarps warps, transposed: rows are kDim / kWarps value columns, columns are
// the key dimensions. Element r of tile (m, n): value 16 m + lane / 4 + 8 (r / 2), key 8 n + 2 (lane % 4) + r
// % 2, so that pairs of keys are what an mma takes as B.
template <typename T, int kDim, int kWarps>
struct StateTile {
  static constexpr int kM = kDim / kWarps / 16;
  static constexpr int kN = kDim / 8;
  static constexpr int kThreads = kWarps * 32;
  float s[kM][kN][4];

  __device__ static int value_index(int m, int r) {
    return threadIdx.x / 32 * (kDim / kWarps) + 16 * m + threadIdx.x % 32 / 4 + 8 * (r / 2);
  }
  __device__ static int key_index(int n, int r) { return 8 * n + 2 * (threadIdx.x % 4) + r % 2; }

  // From or to the state [K, V] of a head.
  __device__ void load(const float* state) {
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) {
      const int m = i / (kN * 4), n = i / 4 % kN, r = i % 4;
      s[m][n][r] = state == nullptr ? 0.0f : state[key_index(n, r) * kDim + value_index(m, r)];
    }
  }
  __device__ void store(float* state) const {
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) {
      const int m = i / (kN * 4), n = i / 4 % kN, r = i % 4;
      state[key_index(n, r) * kDim + value_index(m, r)] = s[m][n][r];
    }
  }

  // From or to the workspace, in an order of its own: see scan_kernel.
  __device__ void load_packed(const float* packed) {
#pragma unroll
    for (int i = 0; i < kM * kN; ++i) {
      const float4 x = reinterpret_cast<const float4*>(packed)[i * kThreads + threadIdx.x];
      float (&to)[4] = s[i / kN][i % kN];
      to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
    }
  }
  __device__ void store_packed(float* packed) const {
#pragma unroll
    for (int i = 0; i < kM * kN; ++i) {
      const float (&from)[4] = s[i / kN][i % kN];
      reinterpret_cast<float4*>(packed)[i * kThreads + threadIdx.x] =
          make_float4(from[0], from[1], from[2], from[3]);
    }
  }

  // S = (1 + shrink) S + sum over the tokens of the tiles of weight * key value^T.
  __device__ void advance(uint32_t key_tile, uint32_t value_tile, const SplitWeights* weights, float shrink) {
    using Tile = Block<kDim / 8>;
    const int warp = threadIdx.x / 32, pair = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) {
      float& x = s[i / (kN * 4)][i / 4 % kN][i % 4];
      x = fmaf(shrink, x, x);
    }
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      const SplitWeights first = weights[8 * k + pair], second = weights[8 * k + 4 + pair];
      uint32_t high[kM][4], low[kM][4];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t value[4];
        Tile::columns_as_a(value, value_tile, 16 * k, warp * (kDim / kWarps / 8) + 2 * m);
#pragma unroll
        for (int i = 0; i < 4; ++i) weigh<T>(value[i], i < 2 ? first : second, high[m][i], low[m][i]);
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t key[4];
        Tile::columns_as_b(key, key_tile, 16 * k, n);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(s[m][n], high[m], key[0], key[1]);
          mma<T>(s[m][n + 1], high[m], key[2], key[3]);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          mma<T>(s[m][n], low[m], key[0], key[1]);
          mma<T>(s[m][n + 1], low[m], key[2], key[3]);
        }
      }
    }
  }
};

// weights[p] for tokens 2 p and 2 p + 1 of a chunk: what is left of each after the chunk's last valid token.
template <typename T>
__device__ __forceinline__ void fill_weights(SplitWeights* weights, float log_decay, int valid) {
  if (threadIdx.x < kChunk / 2) {
    const int token = 2 * threadIdx.x;
    weights[threadIdx.x] = split_weights<T>(expf(log_decay * max(valid - 1 - token, 0)),
                                            expf(log_decay * max(valid - 2 - token, 0)));
  }
}

}  // namespace linear_attention
}  // namespace ringkernels
