// From the input of a projection to operand B in shared memory: norm, gate, quantization, in every block.
#pragma once

#include "projection/operand.cuh"
#include "projection/plan.h"

namespace ringkernels {

// Parts of a block's shared memory.
struct StageBuffers {
  char* tokens;        // [planes, m, 64 bytes], see operand.cuh
  float* token_scale;  // [64]; kBlock128: [blocks of the chunk, m]
  float2* partials;    // [m, layout.partials()]
};

// A token belongs to a team of warps, the same in all passes.
template <int kThreads>
struct Team {
  int index;   // first token
  int count;   // teams of a block
  int thread;  // within the team
  int size;    // threads of a team

  __device__ __forceinline__ explicit Team(int m) {
    count = 1;
    while (count < m && count < kThreads / 32) count *= 2;
    size = kThreads / count;
    index = threadIdx.x / size;
    thread = threadIdx.x % size;
  }
};

// The input needs no arithmetic: codes, or numbers in the format of the weights.
template <typename Operand>
__device__ __forceinline__ bool is_raw(const ProjectionParams& p) {
  return p.prologue == Prologue::kNone && p.input_dtype == Operand::kDType;
}

// Copy a chunk of the input. `between` is called while the first loads are under way.
template <typename Operand, int kThreads, int kBatch, bool kBlockScale, typename Between>
__device__ __forceinline__ void stage_raw(const ProjectionParams& p, const ProjectionPlan& plan, int chunk,
                                          const StageBuffers& to, Between between) {
  constexpr int kPiece = 16;
  const int first = chunk * plan.chunk_steps * 2;
  const int count = min(plan.chunk_steps * 2, plan.total_planes - first);
  const int pieces = count * (kPlaneBytes / kPiece), all = pieces * p.m;
  const char* input = static_cast<const char*>(p.input) + first * kPlaneBytes;
  const int64_t row_bytes = p.input_row_stride * Operand::kBytes;
  float scale = 0.0f;
  if (Operand::kQuantized && !kBlockScale && threadIdx.x < p.m)
    scale = p.input_scale ? p.input_scale[threadIdx.x] : *p.static_scale;
  for (int base = threadIdx.x; base - (int)threadIdx.x < all; base += kBatch * kThreads) {
    uint4 batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = base + i * kThreads, token = item / pieces, piece = item - token * pieces;
      if (item < all) batch[i] = *reinterpret_cast<const uint4*>(input + token * row_bytes + piece * kPiece);
    }
    if (base == (int)threadIdx.x) between();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = base + i * kThreads, token = item / pieces, piece = item - token * pieces;
      if (item < all)
        *reinterpret_cast<uint4*>(to.tokens + (piece / 4 * p.m + token) * kPlaneBytes + piece % 4 * kPiece) =
            batch[i];
    }
  }
  if (!Operand::kQuantized) return;
  if (kBlockScale) {
    const int blocks = (count + 1) / 2, row = (p.k + kScaleBlock - 1) / kScaleBlock;
    for (int item = threadIdx.x; item < blocks * p.m; item += kThreads) {
      const int token = item % p.m, block = item / p.m;
      to.token_scale[item] = p.input_scale ? p.input_scale[token * row + first / 2 + block] : *p.static_scale;
    }
  } else if (threadIdx.x < p.m) {
    to.token_scale[threadIdx.x] = scale;
  }
}

// An octet of the input and what it is multiplied by, as loaded.
struct Fetched {
  RawOctet raw, weight;
  uint4 gate;
};

__device__ __forceinline__ Fetched fetch(const ProjectionParams& p, int token, int octet) {
  const int k = octet * kOctet;
  Fetched fetched;
  fetched.raw = load_raw(p.input, token * p.input_row_stride + k, p.input_dtype);
  if (p.prologue == Prologue::kGroupNormGate)
    fetched.gate = load_raw(p.gate, token * p.gate_row_stride + k, DType::kBFloat16).low;
  if (p.prologue != Prologue::kNone) fetched.weight = load_raw(p.norm_weight, k, DType::kFloat32);
  return fetched;
}

// x: what is left to be multiplied by 1 / rms. Returns the input's sum of squares.
__device__ __forceinline__ float products(const ProjectionParams& p, const Fetched& fetched,
                                          float (&x)[kOctet]) {
  unpack(fetched.raw, p.input_dtype, x);
  if (p.prologue == Prologue::kNone) return 0.0f;
  float w[kOctet], squares = 0.0f;
  unpack(fetched.weight, DType::kFloat32, w);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) squares = fmaf(x[i], x[i], squares);
  if (p.prologue == Prologue::kGroupNormGate) {
    float g[kOctet];
    RawOctet gate;
    gate.low = fetched.gate;
    unpack(gate, p.input_dtype, g);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) w[i] *= sigmoid(g[i]);
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] *= w[i];
  return squares;
}

// The scale of a token, where there is one per token.
template <typename Operand, bool kBlockScale>
__device__ __forceinline__ float scale_of(const ProjectionParams& p, const RowStats& stats) {
  if (!Operand::kQuantized || kBlockScale) return 0.0f;
  return p.static_scale ? *p.static_scale : dynamic_scale(stats.largest, Operand::kDType);
}

// Quantize or round an octet, into its place. All lanes of a warp call this together.
template <typename Operand, bool kBlockScale>
__device__ __forceinline__ void put_octet(const ProjectionParams& p, const StageBuffers& to, int token,
                                          int octet, bool inside, const float (&x)[kOctet], float scale) {
  constexpr int kBytes = kOctet * Operand::kBytes, kPlaneOctets = kPlaneBytes / kBytes;
  char* place =
      to.tokens + (octet / kPlaneOctets * p.m + token) * kPlaneBytes + octet % kPlaneOctets * kBytes;
  if constexpr (Operand::kQuantized) {
    if (kBlockScale) {
      scale = dynamic_scale(block_max(inside ? largest_of(x) : 0.0f), Operand::kDType);
      if (p.static_scale) scale = *p.static_scale;
      if (inside && octet % 16 == 0) to.token_scale[octet / 16 * p.m + token] = scale;
    }
    if (inside) *reinterpret_cast<uint2*>(place) = quantize_octet(x, scale, Operand::kDType);
  } else if (inside) {
    *reinterpret_cast<uint4*>(place) = pack_half(x, Operand::kDType);
  }
}

// The whole input at once, kept in registers between the passes. A thread has one octet of every count-th
// token, so that the norm's weight is read once.
template <typename Operand, int kThreads, int kHeld, bool kBlockScale, typename Between>
__device__ __forceinline__ void stage_held(const ProjectionParams& p, const ProjectionPlan& plan,
                                           const StageBuffers& to, Between between) {
  const int octets = p.k / kOctet, size = (octets + 31) / 32 * 32, count = kThreads / size;
  const int octet = threadIdx.x % size, first = threadIdx.x / size;
  const bool active = octet < octets && first < count;
  RawOctet weight, raw[kHeld];
  uint4 gate[kHeld];
  float x[kHeld][kOctet];
  if (active && p.prologue != Prologue::kNone)
    weight = load_raw(p.norm_weight, octet * kOctet, DType::kFloat32);
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    const int token = first + v * count;
    if (!active || token >= p.m) continue;
    raw[v] = load_raw(p.input, token * p.input_row_stride + octet * kOctet, p.input_dtype);
    if (p.prologue == Prologue::kGroupNormGate)
      gate[v] = load_raw(p.gate, token * p.gate_row_stride + octet * kOctet, DType::kBFloat16).low;
  }
  between();
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    const int token = first + v * count;
    const bool inside = active && token < p.m;
    if (v * count >= p.m) break;
    float2 sums = make_float2(0.0f, 0.0f);
    if (inside) {
      sums.x = products(p, Fetched{raw[v], weight, gate[v]}, x[v]);
      sums.y = largest_of(x[v]);
    }
    if (plan.stats_bytes > 0)
      leave_partial(to.partials + token * plan.layout.partials(), plan.layout, octet, inside, sums);
  }
  if (plan.stats_bytes > 0) __syncthreads();
#pragma unroll
  for (int v = 0; v < kHeld; ++v) {
    const int token = first + v * count;
    if (first >= count || token >= p.m) break;
    RowStats stats = {1.0f, 0.0f};
    if (plan.stats_bytes > 0)
      stats = gather_row(to.partials + token * plan.layout.partials(), plan.layout,
                         p.prologue == Prologue::kNone ? -1.0f : p.norm_eps);
    const float scale = scale_of<Operand, kBlockScale>(p, stats);
    if (Operand::kQuantized && !kBlockScale && octet == 0) to.token_scale[token] = scale;
    const float factor = stats.factor(plan.layout, octet);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[v][i] *= factor;
    put_octet<Operand, kBlockScale>(p, to, token, octet, active, x[v], scale);
  }
}

// First pass over an input that is too large for registers: sums of squares and largest magnitudes.
template <int kThreads>
__device__ __forceinline__ void measure_tokens(const ProjectionParams& p, const ProjectionPlan& plan,
                                               const StageBuffers& to) {
  const Team<kThreads> team(p.m);
  const int octets = p.k / kOctet;
  for (int token = team.index; token < p.m; token += team.count) {
#pragma unroll 2
    for (int base = team.thread & ~31; base < octets; base += team.size) {
      const int octet = base + threadIdx.x % 32;
      float x[kOctet];
      float2 sums = make_float2(0.0f, 0.0f);
      if (octet < octets) {
        sums.x = products(p, fetch(p, token, octet), x);
        sums.y = largest_of(x);
      }
      leave_partial(to.partials + token * plan.layout.partials(), plan.layout, octet, octet < octets, sums);
    }
  }
}

// Second pass, over the part that belongs to a chunk.
template <typename Operand, int kThreads, bool kBlockScale>
__device__ __forceinline__ void stage_values(const ProjectionParams& p, const ProjectionPlan& plan, int chunk,
                                             const StageBuffers& to) {
  constexpr int kStepOctets = kStepBytes / Operand::kBytes / kOctet;
  const Team<kThreads> team(p.m);
  const int first = chunk * plan.chunk_steps * kStepOctets;
  const int count = min(plan.chunk_steps * kStepOctets, p.k / kOctet - first);
  for (int token = team.index; token < p.m; token += team.count) {
    RowStats stats = {1.0f, 0.0f};
    if (plan.stats_bytes > 0)
      stats = gather_row(to.partials + token * plan.layout.partials(), plan.layout,
                         p.prologue == Prologue::kNone ? -1.0f : p.norm_eps);
    const float scale = scale_of<Operand, kBlockScale>(p, stats);
    if (Operand::kQuantized && !kBlockScale && team.thread == 0) to.token_scale[token] = scale;
#pragma unroll 2
    for (int base = team.thread & ~31; base < count; base += team.size) {
      const int octet = base + threadIdx.x % 32;
      float x[kOctet] = {};
      if (octet < count) products(p, fetch(p, token, first + octet), x);
      const float factor = stats.factor(plan.layout, first + octet);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] *= factor;
      put_octet<Operand, kBlockScale>(p, to, token, octet, octet < count, x, scale);
    }
  }
}

}  // namespace ringkernels
