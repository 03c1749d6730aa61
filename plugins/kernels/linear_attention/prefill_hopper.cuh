// The segment and chunk kernels for Hopper: wgmma, head_dim 128, one block per SM.
//
// One warpgroup copies tiles into shared memory, several chunks ahead; two compute, each on 64 of the 128
// value columns; each computes half of the scores for both. The state is transposed (values down, keys
// across), so that the registers that accumulate it are also the left operand of o^T = S^T q^T: it never goes
// through shared memory.
#pragma once

#include "common/wgmma.cuh"
#include "linear_attention/prefill_shares.cuh"

namespace ringkernels {
namespace linear_attention {
namespace hopper {

using namespace warpgroup;

constexpr int kDim = 128;
constexpr int kComputeThreads = 256;
constexpr int kThreads = kComputeThreads + 128;
constexpr int kComputeWarps = kComputeThreads / 32;
constexpr uint32_t kHalfBytes = kChunk * 128;  // 64 tokens x 64 dimensions
constexpr uint32_t kTileBytes = 2 * kHalfBytes;
constexpr int kChunkStages = 4;
constexpr int kSegmentStages = 6;
// Of the segment kernel, and of the chunk kernel: there the second has one for each warpgroup.
enum SegmentBarrier { kWeightsWritten = 1 };
enum ChunkBarrier { kScoresWritten = 1, kOutputWritten = 2 };

template <int kStages>
struct Barriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  __device__ __forceinline__ TileRing<kStages> ring() {
    return {shared_address(full), shared_address(empty)};
  }
  // By one thread, before the block meets.
  __device__ __forceinline__ void init() {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(shared_address(&full[i]), 128);
      barrier_init(shared_address(&empty[i]), kComputeWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
};

// Behind the tiles of each kernel.
struct SegmentTables {
  SplitWeights weights[2][kChunk / 2];  // of a run, and of the one before
  Barriers<kSegmentStages> barriers;
  Line<kMaxHopperShares> line;
};
struct ChunkTables {
  SplitWeights weights[2][kChunk / 2];  // of a full chunk, and of the last one
  float2 score_powers[2 * kChunk];  // query_scale * decay^(n - kChunk) and of one less, 0 for what is above
  float state_powers[kChunk];       // decay^(n + 1), times query_scale unless the state has it
  Barriers<kChunkStages> barriers;
};

struct SegmentShared {
  static constexpr uint32_t kStageBytes = 2 * kTileBytes;
  static constexpr uint32_t kTables = kSegmentStages * kStageBytes;
  static constexpr size_t kBytes = kTables + sizeof(SegmentTables);
};
struct ChunkShared {
  static constexpr uint32_t kStageBytes = 3 * kTileBytes;
  static constexpr uint32_t kScores = kChunkStages * kStageBytes;  // two buffers of half a tile
  static constexpr uint32_t kOutput = kScores + 2 * kHalfBytes;    // half a tile per warpgroup
  static constexpr uint32_t kTables = kOutput + 2 * kHalfBytes;
  static constexpr size_t kBytes = kTables + sizeof(ChunkTables);
};
static_assert(ChunkShared::kBytes <= 227 * 1024 && SegmentShared::kBytes <= 227 * 1024,
              "shared memory of an SM");

#if RING_HAS_WGMMA

// Copies kChunk rows of a head as two half tiles, by the 128 threads of a warpgroup; rows from `valid` on are
// zero.
template <typename T>
__device__ __forceinline__ void load_halves(uint32_t tile, const T* source, int64_t row_stride, int valid) {
  const int unit = threadIdx.x % 16, first = threadIdx.x % 128 / 16;
  const uint32_t target = tile + unit / 8 * kHalfBytes + tile_offset<8>(first, unit % 8);
#pragma unroll
  for (int i = 0; i < kChunk / 8; ++i) {
    const int row = first + 8 * i;
    copy_async(target + i * 1024, source + (row < valid ? row : 0) * row_stride + unit * 8, row < valid);
  }
}

template <typename T>
__device__ __forceinline__ void set_up(ChunkTables& tables, float log_decay, int last_valid,
                                       float query_scale) {
  constexpr bool kScaleState = DTypeOf<T>::value == DType::kFloat16;
  if (threadIdx.x == 0) tables.barriers.init();
  fill_weights<T>(tables.weights[0], log_decay, kChunk);
  fill_weights<T>(tables.weights[1], log_decay, last_valid);
  for (int i = threadIdx.x; i < 2 * kChunk; i += kThreads) {
    const int distance = i - kChunk;
    tables.score_powers[i] =
        make_float2(distance >= 0 ? query_scale * expf(log_decay * distance) : 0.0f,
                    distance >= 1 ? query_scale * expf(log_decay * (distance - 1)) : 0.0f);
  }
  if (threadIdx.x < kChunk) {
    tables.state_powers[threadIdx.x] =
        (kScaleState ? 1.0f : query_scale) * expf(log_decay * (threadIdx.x + 1));
  }
  __syncthreads();
}

using State = StateTile<float, kDim, kComputeWarps>;

// One warpgroup's 64 value columns of a chunk as left operands: raw, and weighed in two parts.
template <typename T>
struct Values {
  uint32_t raw[kChunk / 16][4], high[kChunk / 16][4], low[kChunk / 16][4];

  __device__ __forceinline__ void load(uint32_t half_tile, const SplitWeights* weights) {
    const int warp = threadIdx.x % 128 / 32, pair = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      Block<8>::columns_as_a(raw[k], half_tile, 16 * k, 2 * warp);
      const SplitWeights first = weights[8 * k + pair], second = weights[8 * k + 4 + pair];
#pragma unroll
      for (int i = 0; i < 4; ++i) weigh<T>(raw[k][i], i < 2 ? first : second, high[k][i], low[k][i]);
    }
  }
};

__device__ __forceinline__ void decay_state(float (&s)[64], float shrink) {
#pragma unroll
  for (int i = 0; i < 64; ++i) s[i] = fmaf(shrink, s[i], s[i]);
}

// S^T += (weighed v)^T k.
template <typename T>
__device__ __forceinline__ void add_to_state(float (&s)[64], const Values<T>& values, uint32_t key_tile) {
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    const uint64_t key = tile_descriptor(key_tile + k * 2048, kHalfBytes);
    wgmma_registers_columns<T>(s, values.high[k], key);
    wgmma_registers_columns<T>(s, values.low[k], key);
  }
}

// The copying warpgroup of the segment kernel: the chunks of all runs in one ring.
template <typename T>
__device__ __forceinline__ void copy_runs(const PrefillArgs& args, SegmentTables& tables, uint32_t tiles) {
  const LinearAttentionPrefillParams& params = args.params;
  ShareWalk<kMaxHopperShares> walk(args, tables.line, blockIdx.x, tables.line.first_pair(args, blockIdx.x));
  Run run;
  int begin = 0, end = 0;  // of the run, among all chunks
  const auto more = [&](int chunk) {
    if (chunk < end) return true;
    if (!walk.next(run)) return false;
    begin = end, end += run.chunks;
    return true;
  };
  tables.barriers.ring().produce_while(more, [&](int chunk, int stage) {
    const uint32_t tile = tiles + stage * SegmentShared::kStageBytes;
    const int64_t source = (run.first + (chunk - begin) * kChunk) * params.row_stride + run.head * kDim;
    load_halves(tile, static_cast<const T*>(params.key) + source, params.row_stride, kChunk);
    load_halves(tile + kTileBytes, static_cast<const T*>(params.value) + source, params.row_stride, kChunk);
  });
}

// The computing warpgroups of the segment kernel.
template <typename T>
__device__ __forceinline__ void add_runs(const PrefillArgs& args, SegmentTables& tables, uint32_t tiles) {
  const TileRing<kSegmentStages> ring = tables.barriers.ring();
  const uint32_t half = threadIdx.x / 128 * kHalfBytes;
  const auto tile_of = [&](int chunk) { return tiles + chunk % kSegmentStages * SegmentShared::kStageBytes; };
  int begin = 0, turn = 0;
  Run run;
  ShareWalk<kMaxHopperShares> walk(args, tables.line, blockIdx.x, tables.line.first_pair(args, blockIdx.x));
  for (; walk.next(run); begin += run.chunks, turn ^= 1) {
    const SplitWeights* weights = tables.weights[turn];
    fill_weights<T>(tables.weights[turn], run.log_decay, kChunk);
    named_barrier(kWeightsWritten, kComputeThreads);
    const int end = begin + run.chunks;
    const float shrink = expm1f(run.log_decay * kChunk);
    State state;
    state.load(nullptr);
    float (&s)[64] = reinterpret_cast<float (&)[64]>(state.s);
    // The next chunk's values are weighed while this chunk's are multiplied.
    Values<T> values[2];
    const auto weigh_values = [&](int chunk, Values<T>& to) {
      if (chunk >= end) return;
      ring.wait(chunk);
      to.load(tile_of(chunk) + kTileBytes + half, weights);
    };
    const auto add_chunk = [&](int chunk, Values<T>& now, Values<T>& next) {
      decay_state(s, shrink);
      pin(s);
      wgmma_fence();
      add_to_state<T>(s, now, tile_of(chunk));
      wgmma_commit();
      weigh_values(chunk + 1, next);
      wgmma_wait<0>();
      pin(s);
      ring.release(chunk);
    };
    weigh_values(begin, values[0]);
    for (int chunk = begin; chunk < end; chunk += 2) {
      add_chunk(chunk, values[0], values[1]);
      if (chunk + 1 < end) add_chunk(chunk + 1, values[1], values[0]);
    }
    state.store_packed(run_state<kDim>(args, run.slot));
  }
}

// Half of the scores of a chunk, for keys [32 g, 32 g + 32) by warpgroup g: s = q k^T.
template <typename T>
__device__ __forceinline__ void start_scores(float (&s)[16], uint32_t tile) {
  const uint32_t keys = tile + kTileBytes + threadIdx.x / 128 * 32 * 128;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    const uint32_t offset = k / 4 * kHalfBytes + k % 4 * 32;
    Wgmma<kFormatOf<T>, 32>::run(s, tile_descriptor(tile + offset), tile_descriptor(keys + offset), k > 0);
  }
}

// Writes query_scale * decay^(i - j) * scores[i][j], 0 above the diagonal.
template <typename T>
__device__ __forceinline__ void write_scores(uint32_t scores, const float (&s)[16], const float2* powers) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int n = i / 2, unit = threadIdx.x / 128 * 4 + n;
    const int query = threadIdx.x % 128 / 32 * 16 + lane / 4 + i % 2 * 8;
    const float2 power = powers[kChunk + query - (8 * unit + lane % 4 * 2)];
    const uint32_t packed = pack<T>(power.x * s[4 * n + i % 2 * 2], power.y * s[4 * n + i % 2 * 2 + 1]);
    const uint32_t address = scores + tile_offset<8>(query, unit) + lane % 4 * 4;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(packed) : "memory");
  }
}

// o^T = S^T q^T, S rounded to T.
template <typename T>
__device__ __forceinline__ void start_output(float (&o)[32], uint32_t (&left)[kDim / 16][4],
                                             const float (&s)[64], uint32_t query_tile, float query_scale) {
  const float factor = DTypeOf<T>::value == DType::kFloat16 ? query_scale : 1.0f;
#pragma unroll
  for (int i = 0; i < kDim / 4; ++i) left[i / 4][i % 4] = pack<T>(factor * s[2 * i], factor * s[2 * i + 1]);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    wgmma_registers_rows<T>(o, left[k], tile_descriptor(query_tile + k / 4 * kHalfBytes + k % 4 * 32), k > 0);
  }
}

// Turns o^T round through shared memory.
template <typename T>
__device__ __forceinline__ void stage_output(uint32_t half_tile, const float (&o)[32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    const uint32_t address =
        half_tile + tile_offset<8>(8 * (n + lane / 16) + lane % 8, 2 * warp + lane / 8 % 2);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(pack<T>(o[4 * n], o[4 * n + 1])), "r"(pack<T>(o[4 * n + 2], o[4 * n + 3])),
                 "r"(pack<T>(o[4 * n + 4], o[4 * n + 5])), "r"(pack<T>(o[4 * n + 6], o[4 * n + 7]))
                 : "memory");
  }
}

// Writes what the warpgroup has staged, rows of 128 bytes.
template <typename T>
__device__ __forceinline__ void write_output(uint32_t half_tile, T* output, int64_t row_stride, int valid) {
  const int unit = threadIdx.x % 8;
  T* target = output + threadIdx.x / 128 * 64 + unit * 8;
#pragma unroll
  for (int i = 0; i < kChunk / 16; ++i) {
    const int row = threadIdx.x % 128 / 8 + 16 * i;
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(half_tile + tile_offset<8>(row, unit))
                 : "memory");
    if (row < valid) __stcs(reinterpret_cast<uint4*>(target + row * row_stride), x);
  }
}

// The computing warpgroups of the chunk kernel; tokens: of this segment.
template <typename T>
__device__ __forceinline__ void compute_chunks(const LinearAttentionPrefillParams& params,
                                               ChunkTables& tables, uint32_t tiles, State& state, T* output,
                                               int tokens, float log_decay) {
  float (&s)[64] = reinterpret_cast<float (&)[64]>(state.s);
  const int chunks = (tokens + kChunk - 1) / kChunk;
  const uint32_t half = threadIdx.x / 128 * kHalfBytes;
  const TileRing<kChunkStages> ring = tables.barriers.ring();
  float score[16], o[32];
  ring.wait(0);
  start_scores<T>(score, tiles);
  wgmma_commit();
  wgmma_wait<0>();
  pin(score);
  write_scores<T>(tiles + ChunkShared::kScores, score, tables.score_powers);
  fence_proxy();
  const float shrink = expm1f(log_decay * kChunk),
              last_shrink = expm1f(log_decay * (tokens - (chunks - 1) * kChunk));
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const uint32_t tile = tiles + chunk % kChunkStages * ChunkShared::kStageBytes;
    // Two buffers: the other warpgroup may still read the scores of the chunk before.
    const uint32_t scores = tiles + ChunkShared::kScores + chunk % 2 * kHalfBytes;
    const uint32_t next_scores = tiles + ChunkShared::kScores + (chunk + 1) % 2 * kHalfBytes;
    const int valid = min(kChunk, tokens - chunk * kChunk);
    uint32_t left[kDim / 16][4];
    start_output<T>(o, left, s, tile, params.query_scale);
    wgmma_commit();
    Values<T> values;
    values.load(tile + 2 * kTileBytes + half, tables.weights[valid < kChunk]);
    named_barrier(kScoresWritten, kComputeThreads);
    wgmma_wait<0>();
    pin(o);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const float2 power =
          *reinterpret_cast<const float2*>(&tables.state_powers[8 * n + threadIdx.x % 4 * 2]);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[4 * n + i] *= i % 2 == 0 ? power.x : power.y;
    }
    pin(o);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
      wgmma_registers_rows<T>(o, values.raw[k], tile_descriptor(scores + 32 * k), true);
    }
    wgmma_commit();
    decay_state(s, chunk + 1 < chunks ? shrink : last_shrink);
    pin(s);
    // The next chunk's scores come before the state, so that they are scaled and written while that is
    // computed.
    if (chunk + 1 < chunks) {
      ring.wait(chunk + 1);
      start_scores<T>(score, tiles + (chunk + 1) % kChunkStages * ChunkShared::kStageBytes);
    }
    wgmma_commit();
    wgmma_fence();
    add_to_state<T>(s, values, tile + kTileBytes);
    wgmma_commit();
    wgmma_wait<2>();
    pin(o);
    stage_output<T>(tiles + ChunkShared::kOutput + half, o);
    wgmma_wait<1>();
    pin(score);
    if (chunk + 1 < chunks) write_scores<T>(next_scores, score, tables.score_powers);
    fence_proxy();  // before the output is written: it would wait for that
    named_barrier(kOutputWritten + threadIdx.x / 128, 128);
    write_output<T>(tiles + ChunkShared::kOutput + half, output + chunk * kChunk * params.output_row_stride,
                    params.output_row_stride, valid);
    wgmma_wait<0>();
    pin(s);
    ring.release(chunk);
  }
}

template <typename T>
__device__ __forceinline__ void chunk_body(const PrefillArgs& args, ChunkTables& tables, uint32_t tiles,
                                           const Row& row) {
  const LinearAttentionPrefillParams& params = args.params;
  const int segment = blockIdx.x, head = blockIdx.y;
  const int start = segment * args.segment_tokens, tokens = min(args.segment_tokens, row.length - start);
  const float log_decay = params.log_decay[head];
  set_up<T>(tables, log_decay, (tokens - 1) % kChunk + 1, params.query_scale);
  if (threadIdx.x >= kComputeThreads) {
    give_registers<40>();
    const int64_t first = (row.first + start) * params.row_stride + head * kDim;
    tables.barriers.ring().produce((tokens + kChunk - 1) / kChunk, [&](int chunk, int stage) {
      const uint32_t tile = tiles + stage * ChunkShared::kStageBytes;
      const int64_t source = first + chunk * kChunk * params.row_stride;
      const int valid = tokens - chunk * kChunk;
      load_halves(tile, static_cast<const T*>(params.query) + source, params.row_stride, valid);
      load_halves(tile + kTileBytes, static_cast<const T*>(params.key) + source, params.row_stride, valid);
      load_halves(tile + 2 * kTileBytes, static_cast<const T*>(params.value) + source, params.row_stride,
                  valid);
    });
  } else {
    take_registers<232>();
    float* final_state = params.state + ((int64_t)row.slot * params.num_heads + head) * kDim * kDim;
    State state;
    if (args.segments > 1) {
      wait_for_previous_kernel();  // the scan; all before it has ended
      state.load_packed(segment_state<kDim>(args, segment, head, blockIdx.z));
    } else {
      state.load(params.reset != nullptr && params.reset[blockIdx.z] != 0 ? nullptr : final_state);
    }
    T* output = static_cast<T*>(params.output) + (row.first + start) * params.output_row_stride + head * kDim;
    compute_chunks<T>(params, tables, tiles, state, output, tokens, log_decay);
    if (start + tokens == row.length) state.store(final_state);
  }
}

#endif  // RING_HAS_WGMMA

// Grids as of the kernels for any GPU.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) segment_kernel(const __grid_constant__ PrefillArgs args) {
#if RING_HAS_WGMMA
  extern __shared__ __align__(1024) char shared[];
  SegmentTables& tables = *reinterpret_cast<SegmentTables*>(shared + SegmentShared::kTables);
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x == 32) tables.barriers.init();
  tables.line.measure(args);
  if (threadIdx.x >= kComputeThreads) {
    give_registers<56>();
    copy_runs<T>(args, tables, shared_address(shared));
  } else {
    take_registers<224>();
    add_runs<T>(args, tables, shared_address(shared));
  }
#else
  __trap();
#endif
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) chunk_kernel(const __grid_constant__ PrefillArgs args) {
#if RING_HAS_WGMMA
  extern __shared__ __align__(1024) char shared[];
  // Behind the scan: see scan_kernel for why the inputs may be read before it has ended.
  if (args.segments == 1) wait_for_previous_kernel();
  allow_next_kernel();
  const Row row = locate_row(args.params, blockIdx.z);
  if ((int)blockIdx.x * args.segment_tokens >= row.length) return;
  ChunkTables& tables = *reinterpret_cast<ChunkTables*>(shared + ChunkShared::kTables);
  chunk_body<T>(args, tables, shared_address(shared), row);
#else
  __trap();
#endif
}

}  // namespace hopper
}  // namespace linear_attention
}  // namespace ringkernels
