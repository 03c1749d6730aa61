// Outputs and final state of a segment, chunk by chunk, on any GPU from sm_80 on (mma.sync).
//
// Per chunk of 64 tokens: o = decay^(i + 1) q S + (decay^(i - j) q k^T, j <= i) v, then S advances. A warp
// owns a quarter of the value columns of S, o and v; the scores are shared by all.
#pragma once

#include "linear_attention/prefill_common.cuh"

namespace ringkernels {
namespace linear_attention {

constexpr int kScoreUnits = kChunk / 8;

// Behind the tiles.
struct ChunkTables {
  SplitWeights weights[kChunk / 2];
  float powers[kChunk + 4];  // decay^n, n = 0..kChunk
};

template <typename T, int kDim, int kStages>
constexpr size_t chunk_shared_bytes() {
  return kStages * 3 * kChunk * kDim * sizeof(T) + kChunk * kChunk * sizeof(T) + sizeof(ChunkTables);
}

// scores[i][j] = query_scale * decay^(i - j) * q_i . k_j for j <= i, blocks of 16 x 16 shared out to the
// warps: warp 0: (0, 0) (3, 0); 1: (1, 0) (1, 1); 2: (2, 0..2); 3: (3, 1..3).
template <typename T, int kDim>
__device__ __forceinline__ void write_scores(uint32_t scores, uint32_t query_tile, uint32_t key_tile,
                                             const float* powers, float query_scale) {
  using Tile = Block<kDim / 8>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = warp < 2 ? 2 : 3;
  float score[3][2][4] = {};
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t query[4];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      if (b >= blocks) break;
      const int row = warp == 0 ? 3 * b : warp, column = warp == 0 ? 0 : warp == 3 ? b + 1 : b;
      if (b == 0 || warp == 0) Tile::rows_as_a(query, query_tile, 16 * row, 2 * k);
      uint32_t key[4];
      Tile::rows_as_b(key, key_tile, 16 * column, 2 * k);
      mma<T>(score[b][0], query, key[0], key[1]);
      mma<T>(score[b][1], query, key[2], key[3]);
    }
  }
#pragma unroll
  for (int b = 0; b < 3; ++b) {
    if (b >= blocks) break;
    const int row = warp == 0 ? 3 * b : warp, column = warp == 0 ? 0 : warp == 3 ? b + 1 : b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // tile i / 2 of 8 columns, rows lane / 4 + 8 (i % 2)
      const int query = 16 * row + lane / 4 + i % 2 * 8, key = 16 * column + i / 2 * 8 + lane % 4 * 2;
      const int distance = query - key;
      const float first = distance >= 0 ? query_scale * powers[max(distance, 0)] : 0.0f;
      const float second = distance >= 1 ? query_scale * powers[max(distance - 1, 0)] : 0.0f;
      const uint32_t packed =
          pack<T>(first * score[b][i / 2][i % 2 * 2], second * score[b][i / 2][i % 2 * 2 + 1]);
      const uint32_t address = scores + tile_offset<kScoreUnits>(query, 2 * column + i / 2) + lane % 4 * 4;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(packed) : "memory");
    }
  }
}

// One warp's outputs of a chunk: 64 tokens by kDim / kWarps value columns.
template <typename T, int kDim>
struct OutputTile {
  static constexpr int kM = kChunk / 16;
  static constexpr int kN = kDim / kWarps / 8;
  // fp16 cannot hold every state, but it can hold every output that fp16 can hold.
  static constexpr bool kScaleState = DTypeOf<T>::value == DType::kFloat16;
  float o[kM][kN][4];

  // o = query_scale * decay^(i + 1) * q S.
  __device__ void from_state(const StateTile<T, kDim, kWarps>& state, uint32_t query_tile,
                             const float* powers, float scale) {
    using Tile = Block<kDim / 8>;
#pragma unroll
    for (int i = 0; i < kM * kN * 4; ++i) o[i / (kN * 4)][i / 4 % kN][i % 4] = 0.0f;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      uint32_t b[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float (&s)[4] = state.s[n / 2][2 * k + i];
          const float factor = kScaleState ? scale : 1.0f;
          b[n][i] = pack<T>(s[n % 2 * 2] * factor, s[n % 2 * 2 + 1] * factor);
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t query[4];
        Tile::rows_as_a(query, query_tile, 16 * m, 2 * k);
#pragma unroll
        for (int n = 0; n < kN; ++n) mma<T>(o[m][n], query, b[n][0], b[n][1]);
      }
    }
    const float factor = kScaleState ? 1.0f : scale;
    const int row = threadIdx.x % 32 / 4;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const float first = factor * powers[16 * m + row + 1], second = factor * powers[16 * m + row + 9];
#pragma unroll
      for (int i = 0; i < kN * 4; ++i) o[m][i / 4][i % 4] *= i % 4 < 2 ? first : second;
    }
  }

  // o += scores v, whose blocks above the diagonal are neither written nor read.
  __device__ void add_scores(uint32_t scores, uint32_t value_tile) {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int k = 0; k < kM; ++k) {
      uint32_t value[kN / 2][4];
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) {
        Block<kDim / 8>::columns_as_b(value[n], value_tile, 16 * k, warp * kN + 2 * n);
      }
#pragma unroll
      for (int m = k; m < kM; ++m) {
        uint32_t score[4];
        Block<kScoreUnits>::rows_as_a(score, scores, 16 * m, 2 * k);
#pragma unroll
        for (int n = 0; n < kN; ++n)
          mma<T>(o[m][n], score, value[n / 2][n % 2 * 2], value[n / 2][n % 2 * 2 + 1]);
      }
    }
  }

  // Through a tile that only this warp's columns are used of, so that rows are written in 16-byte pieces.
  __device__ void store(uint32_t tile, T* output, int64_t row_stride, int valid) const {
    constexpr int kRowsAtOnce = 32 / kN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kM * kN * 2; ++i) {
      const int m = i / (kN * 2), n = i / 2 % kN, half = i % 2;
      const uint32_t packed = pack<T>(o[m][n][half * 2], o[m][n][half * 2 + 1]);
      const uint32_t address =
          tile + tile_offset<kDim / 8>(16 * m + lane / 4 + half * 8, warp * kN + n) + lane % 4 * 4;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(packed) : "memory");
    }
    __syncwarp();
    const int unit = warp * kN + lane % kN;
#pragma unroll
    for (int i = 0; i < kChunk / kRowsAtOnce; ++i) {
      const int row = lane / kN + i * kRowsAtOnce;
      uint4 x;
      asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(tile + tile_offset<kDim / 8>(row, unit))
                   : "memory");
      if (row < valid) __stcs(reinterpret_cast<uint4*>(output + row * row_stride + unit * 8), x);
    }
  }
};

// Grid: x = segment, y = head, z = row. kStages: chunks in shared memory, 2, or 1 where it is too small.
template <typename T, int kDim, int kStages>
__global__ void __launch_bounds__(kThreads, 2) chunk_kernel(const __grid_constant__ PrefillArgs args) {
  constexpr uint32_t kTileBytes = kChunk * kDim * sizeof(T);
  extern __shared__ __align__(128) char shared[];
  const uint32_t tiles = shared_address(shared), scores = tiles + kStages * 3 * kTileBytes;
  ChunkTables& tables =
      *reinterpret_cast<ChunkTables*>(shared + kStages * 3 * kTileBytes + kChunk * kChunk * sizeof(T));
  const LinearAttentionPrefillParams& params = args.params;
  const int segment = blockIdx.x, head = blockIdx.y;

  // Behind the scan: see scan_kernel for why the inputs may be read before it has ended.
  if (args.segments == 1) wait_for_previous_kernel();
  allow_next_kernel();
  const Row row = locate_row(params, blockIdx.z);
  const int start = segment * args.segment_tokens, end = min(start + args.segment_tokens, row.length);
  if (start >= end) return;

  const float log_decay = params.log_decay[head];
  const int64_t source = (row.first + start) * params.row_stride + head * kDim;
  T* output = static_cast<T*>(params.output) + (row.first + start) * params.output_row_stride + head * kDim;
  const auto load = [&](int chunk) {
    const uint32_t tile = tiles + chunk % kStages * 3 * kTileBytes;
    const int64_t offset = source + chunk * kChunk * params.row_stride;
    const int valid = end - start - chunk * kChunk;
    load_tile<T, kDim>(tile, static_cast<const T*>(params.query) + offset, params.row_stride, valid);
    load_tile<T, kDim>(tile + kTileBytes, static_cast<const T*>(params.key) + offset, params.row_stride,
                       valid);
    load_tile<T, kDim>(tile + 2 * kTileBytes, static_cast<const T*>(params.value) + offset, params.row_stride,
                       valid);
    copy_commit();
  };
  load(0);
  for (int n = threadIdx.x; n <= kChunk; n += kThreads) tables.powers[n] = expf(log_decay * n);
  fill_weights<T>(tables.weights, log_decay, kChunk);

  StateTile<T, kDim, kWarps> state;
  float* final_state = params.state + ((int64_t)row.slot * params.num_heads + head) * kDim * kDim;
  if (args.segments > 1) {
    wait_for_previous_kernel();
    state.load_packed(segment_state<kDim>(args, segment, head, blockIdx.z));
  } else {
    const bool fresh = params.reset != nullptr && params.reset[blockIdx.z] != 0;
    state.load(fresh ? nullptr : final_state);
  }

  const int chunks = (end - start + kChunk - 1) / kChunk;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int valid = min(kChunk, end - start - chunk * kChunk);
    const uint32_t tile = tiles + chunk % kStages * 3 * kTileBytes;
    copy_wait<0>();
    __syncthreads();
    if (kStages > 1 && chunk + 1 < chunks) load(chunk + 1);
    if (valid < kChunk) fill_weights<T>(tables.weights, log_decay, valid);
    write_scores<T, kDim>(scores, tile, tile + kTileBytes, tables.powers, params.query_scale);
    {
      OutputTile<T, kDim> out;
      out.from_state(state, tile, tables.powers, params.query_scale);
      __syncthreads();  // scores are written, and nobody reads the query tile any more
      out.add_scores(scores, tile + 2 * kTileBytes);
      out.store(tile, output + chunk * kChunk * params.output_row_stride, params.output_row_stride, valid);
    }
    state.advance(tile + kTileBytes, tile + 2 * kTileBytes, tables.weights, expm1f(log_decay * valid));
    if (kStages == 1 && chunk + 1 < chunks) {
      __syncthreads();
      load(chunk + 1);
    }
  }
  if (end == row.length) state.store(final_state);
}

}  // namespace linear_attention
}  // namespace ringkernels
