// Router kernels. Few tokens: one kernel, of blocks that compute the logits of two experts each, or of four
// for several tokens, and a block per token that chooses. Many tokens: a tiled fp32 product split over k, and
// a kernel that adds the parts and chooses.
#pragma once

#include <type_traits>

#include "common/launch.cuh"
#include "moe/choose_experts.cuh"

namespace ringkernels::moe {

// Tokens that the one-kernel router takes: a block each waits for all others, so few may wait.
constexpr int kRouterFewTokens = 8;
constexpr int kRowVectors = 2;  // float4 of a row per thread that are fetched ahead: rows of up to 2048
constexpr int kRouterWarps = kRouterThreads / 32;

template <bool kByRank>
using Scratch = std::conditional_t<kByRank, RankScratch, ChoiceScratch>;

// 4 elements of the hidden state as fp32.
template <typename Hidden>
__device__ __forceinline__ float4 load_hidden4(const void* hidden, int64_t element) {
  const auto v = Vec<Hidden, 4>::load(static_cast<const Hidden*>(hidden) + element);
  return {to_float(v.data[0]), to_float(v.data[1]), to_float(v.data[2]), to_float(v.data[3])};
}

__device__ __forceinline__ float dot4(const float4& a, const float4& b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ __forceinline__ float4 times4(const float4& a, const float4& b) {
  return {a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w};
}

// A logit and the mark that it is there, in one word, so that it needs no fence: 0 means "not yet".
__device__ __forceinline__ void post_logit(unsigned long long* slot, float logit) {
  const unsigned long long word = 1ull << 32 | __float_as_uint(logit);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(slot), "l"(word) : "memory");
}

__device__ __forceinline__ float await_logit(unsigned long long* slot) {
  unsigned long long word;
  do {
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(slot) : "memory");
  } while (word == 0);
  *slot = 0;  // for the next launch; nobody else reads this word
  return __uint_as_float(static_cast<uint32_t>(word));
}

// Sums over a warp of kCount values per lane: lane l gets that of value l / (32 / kCount). Half of the values
// change sides at each step, so that few shuffles do.
template <int kHalf, int kOffset, int kCount>
__device__ __forceinline__ float fold_warp(float (&values)[kCount]) {
  const bool upper = threadIdx.x & kOffset;
  if constexpr (kHalf > 0) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float sent = upper ? values[i] : values[i + kHalf], kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullWarp, sent, kOffset);
    }
  } else {
    values[0] += __shfl_xor_sync(kFullWarp, values[0], kOffset);
  }
  if constexpr (kOffset > 1) return fold_warp<kHalf / 2, kOffset / 2>(values);
  return values[0];
}

// With one token the next kernel may come in before the wait, which makes a step at batch 1 16 us shorter.
// With more it would make one at batch 8 98 us longer.
template <int kTokens>
__device__ __forceinline__ void await_hidden() {
  if (kTokens == 1) allow_next_kernel();
  wait_for_previous_kernel();
  if (kTokens > 1) allow_next_kernel();
}

// What a thread has of the rows of its block: k = 4 (base + thread) and 1024 further on.
template <int kRowsPerBlock>
struct RowParts {
  float4 weight[kRowsPerBlock][kRowVectors];
  float4 norm[kRowVectors];

  __device__ __forceinline__ void load(const RouterParams& p, int base) {
    const int vectors = p.hidden_size / 4;
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) {
      const int v = base + i * kRouterThreads + (int)threadIdx.x;
      const bool inside = v < vectors;
#pragma unroll
      for (int r = 0; r < kRowsPerBlock; ++r) {
        const int expert = min((int)blockIdx.x * kRowsPerBlock + r, p.num_experts - 1);
        const auto* row = reinterpret_cast<const float4*>(p.router_weight + (int64_t)expert * p.hidden_size);
        weight[r][i] = inside ? __ldg(row + v) : float4{};
      }
      norm[i] = {1.0f, 1.0f, 1.0f, 1.0f};
      if (p.norm_weight != nullptr && inside)
        norm[i] = __ldg(reinterpret_cast<const float4*>(p.norm_weight) + v);
    }
  }
};

// A thread's part of a token: as RowParts.
template <typename Hidden>
__device__ __forceinline__ void load_token(const RouterParams& p, int token, int base,
                                           float4 (&x)[kRowVectors]) {
#pragma unroll
  for (int i = 0; i < kRowVectors; ++i) {
    const int v = base + i * kRouterThreads + (int)threadIdx.x;
    x[i] = v < p.hidden_size / 4 ? load_hidden4<Hidden>(p.hidden, (int64_t)token * p.hidden_size + v * 4)
                                 : float4{};
  }
}

// Posts the dot products of all tokens with the experts of this block, without the factor of the norm.
template <typename Hidden, int kTokens, int kRowsPerBlock>
__device__ __forceinline__ void post_logits(const RouterParams& p) {
  constexpr int kValues = kTokens * kRowsPerBlock, kLanes = 32 / kValues;  // lanes that have the same sum
  static_assert(kValues <= 32);
  __shared__ float partial[kValues][kRouterWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  RowParts<kRowsPerBlock> rows;
  rows.load(p, 0);
  await_hidden<kTokens>();
  float dot[kValues] = {};
  for (int base = 0; base < p.hidden_size / 4; base += kRowVectors * kRouterThreads) {
    float4 x[kTokens][kRowVectors];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) load_token<Hidden>(p, min(t, p.tokens - 1), base, x[t]);
    if (base > 0) rows.load(p, base);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kRowVectors; ++i) {
        const float4 scaled = times4(x[t][i], rows.norm[i]);
#pragma unroll
        for (int r = 0; r < kRowsPerBlock; ++r)
          dot[t * kRowsPerBlock + r] = dot4(scaled, rows.weight[r][i], dot[t * kRowsPerBlock + r]);
      }
    }
  }
  const float sum = fold_warp<kValues / 2, 16>(dot);
  if (lane % kLanes == 0) partial[lane / kLanes][warp] = sum;
  __syncthreads();
  if (thread >= kValues) return;
  const int token = thread / kRowsPerBlock, expert = blockIdx.x * kRowsPerBlock + thread % kRowsPerBlock;
  float logit = 0.0f;
#pragma unroll
  for (int w = 0; w < kRouterWarps; ++w) logit += partial[thread][w];
  auto* words = static_cast<unsigned long long*>(p.workspace);
  if (token < p.tokens && expert < p.num_experts)
    post_logit(words + (int64_t)token * p.num_experts + expert, logit);
}

// The factor of a token's norm, by a whole block.
template <typename Hidden>
__device__ __forceinline__ float norm_factor(const RouterParams& p, int token) {
  __shared__ float squares[kRouterWarps];
  float sum = 0.0f;
#pragma unroll 1
  for (int base = 0; base < p.hidden_size / 4; base += kRowVectors * kRouterThreads) {
    float4 x[kRowVectors];
    load_token<Hidden>(p, token, base, x);
#pragma unroll
    for (int i = 0; i < kRowVectors; ++i) sum = dot4(x[i], x[i], sum);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kRouterWarps; ++w) sum += squares[w];
  return rsqrtf(sum / p.hidden_size + p.norm_eps);
}

// What a choice needs and no other kernel writes: before the wait. Returns the bias of expert threadIdx.x.
template <bool kByRank>
__device__ __forceinline__ float prepare_choice(const RouterParams& p, Scratch<kByRank>& scratch) {
  float bias = 0.0f;
  if constexpr (kByRank) {
    const int expert = threadIdx.x;
    clear_ranks(p, scratch);
    if (expert < p.num_experts) bias = __ldg(p.expert_bias + expert);
  }
  return bias;
}

// logit(e) is called once for each expert.
template <bool kByRank, typename Logit>
__device__ __forceinline__ void choose(const RouterParams& p, int token, Scratch<kByRank>& scratch,
                                       float bias, Logit logit) {
  if constexpr (kByRank) {
    const int expert = threadIdx.x;
    choose_by_rank(p, token, scratch, bias, expert < p.num_experts ? logit(expert) : 0.0f);
  } else {
    choose_experts(p, token, scratch, logit);
  }
}

// Awaits the dot products of a token and chooses its experts.
template <typename Hidden, int kTokens, bool kByRank>
__device__ __forceinline__ void choose_posted(const RouterParams& p, int token) {
  __shared__ Scratch<kByRank> scratch;
  auto* words = static_cast<unsigned long long*>(p.workspace) + (int64_t)token * p.num_experts;
  const float bias = prepare_choice<kByRank>(p, scratch);
  await_hidden<kTokens>();
  const float factor = p.norm_weight != nullptr ? norm_factor<Hidden>(p, token) : 1.0f;
  choose<kByRank>(p, token, scratch, bias, [&](int e) { return await_logit(words + e) * factor; });
}

// grid: num_experts / kRowsPerBlock, then a block per token that waits for the others: it comes last, so that
// they can always run. Workspace: [N, E] words. kTokens: 1 or kRouterFewTokens.
template <typename Hidden, int kTokens, int kRowsPerBlock, bool kByRank>
__global__ void __launch_bounds__(kRouterThreads)
    router_few_kernel(const __grid_constant__ RouterParams p) {
  const int products = gridDim.x - p.tokens;
  if ((int)blockIdx.x < products) {
    post_logits<Hidden, kTokens, kRowsPerBlock>(p);
  } else {
    choose_posted<Hidden, kTokens, kByRank>(p, blockIdx.x - products);
  }
}

constexpr int kTileTokens = 32;
constexpr int kTileExperts = 256;
constexpr int kTileK = 32;
constexpr int kTilePitch = kTileK;  // floats
constexpr int kTileStages = 2;
constexpr size_t kTileBytes = (size_t)kTileStages * (kTileExperts + kTileTokens) * kTilePitch * sizeof(float);

// Where k (a multiple of 4) of a row lies in a tile: odd rows have their halves swapped, so that 8 lanes,
// which read 64 bytes of two rows, meet all banks.
__device__ __forceinline__ int tile_offset(int row, int k) {
  return row * kTilePitch + (k ^ (row % 2 * (kTileK / 2)));
}

__device__ __forceinline__ void copy_async16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0));
}

// The upper part of an fp32 number as TF32, and what is left: together 22 bits or more, an error below that
// of summing 2048 products in fp32.
struct SplitFloat {
  uint32_t high;
  uint32_t low;

  __device__ __forceinline__ explicit SplitFloat(float x) {
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x));
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(x - __uint_as_float(high)));
  }
};

__device__ __forceinline__ void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Where the parts of the product lie in the workspace: logits [splits, N, E], then squares [splits, N].
struct RouterParts {
  float* logits;
  float* squares;
  int splits;
  int k_per_split;  // a multiple of kTileK
};

// acc += 32 experts x 32 tokens of one warp over kTileK. 16-bit hidden states are exact in TF32, so that only
// the weights are split; fp32 ones are split too. The order of k within a step is free: a lane's 4 neighbours
// are used as elements c and c + 4 of two products.
template <bool kSplitTokens>
__device__ __forceinline__ void multiply_tile(float (&acc)[2][4][4], const float* experts,
                                              const float* tokens) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    const int offset = tile_offset(lane / 4, k + lane % 4 * 4);
    float4 x[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) x[n] = *reinterpret_cast<const float4*>(tokens + n * 8 * kTilePitch + offset);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const float4 low_row = *reinterpret_cast<const float4*>(experts + m * 16 * kTilePitch + offset);
      const float4 high_row = *reinterpret_cast<const float4*>(experts + (m * 16 + 8) * kTilePitch + offset);
      const float rows[2][4] = {{low_row.x, low_row.y, low_row.z, low_row.w},
                                {high_row.x, high_row.y, high_row.z, high_row.w}};
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        const SplitFloat a0(rows[0][j]), a1(rows[1][j]), a2(rows[0][j + 1]), a3(rows[1][j + 1]);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const SplitFloat b0(j == 0 ? x[n].x : x[n].z), b1(j == 0 ? x[n].y : x[n].w);
          mma_tf32(acc[m][n], a0.low, a1.low, a2.low, a3.low, b0.high, b1.high);
          if (kSplitTokens) mma_tf32(acc[m][n], a0.high, a1.high, a2.high, a3.high, b0.low, b1.low);
          mma_tf32(acc[m][n], a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
        }
      }
    }
  }
}

// grid: (token tiles, splits, expert tiles). Each warp has 32 experts of the tile and its 32 tokens.
template <typename Hidden>
__global__ void __launch_bounds__(kRouterThreads, 2)
    router_product_kernel(const __grid_constant__ RouterParams p, const __grid_constant__ RouterParts parts) {
  extern __shared__ __align__(16) float stages[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_token = blockIdx.x * kTileTokens, first_expert = blockIdx.z * kTileExperts;
  const int k_begin = blockIdx.y * parts.k_per_split;
  const int k_end = min(k_begin + parts.k_per_split, p.hidden_size);
  const int steps = (k_end - k_begin + kTileK - 1) / kTileK;
  auto weights_of = [&](int step) {
    return stages + step % kTileStages * (kTileExperts + kTileTokens) * kTilePitch;
  };
  auto tokens_of = [&](int step) { return weights_of(step) + kTileExperts * kTilePitch; };
  auto fetch_weights = [&](int step) {
    const int k = k_begin + step * kTileK + thread % 8 * 4;
#pragma unroll
    for (int i = 0; i < kTileExperts / 32; ++i) {
      const int row = thread / 8 + i * 32, expert = first_expert + row;
      const bool valid = expert < p.num_experts && k < k_end;
      const float* source = p.router_weight + (valid ? (int64_t)expert * p.hidden_size + k : 0);
      copy_async16(weights_of(step) + tile_offset(row, thread % 8 * 4), source, valid);
    }
    asm volatile("cp.async.commit_group;");
  };
  // This thread's 4 elements of the token tile: row thread / 8.
  const int my_token = first_token + thread / 8;
  float squares = 0.0f;
  auto fetch_tokens = [&](int step) {
    const int k = k_begin + step * kTileK + thread % 8 * 4;
    if (my_token >= p.tokens || k >= k_end) return float4{};
    float4 x = load_hidden4<Hidden>(p.hidden, (int64_t)my_token * p.hidden_size + k);
    if (p.norm_weight != nullptr) {
      squares = dot4(x, x, squares);
      x = times4(x, *reinterpret_cast<const float4*>(p.norm_weight + k));
    }
    return x;
  };
  float acc[2][4][4] = {};
  fetch_weights(0);
  wait_for_previous_kernel();
  allow_next_kernel();
  float4 x = fetch_tokens(0);
  for (int step = 0; step < steps; ++step) {
    *reinterpret_cast<float4*>(tokens_of(step) + tile_offset(thread / 8, thread % 8 * 4)) = x;
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    if (step + 1 < steps) {
      fetch_weights(step + 1);
      x = fetch_tokens(step + 1);
    }
    multiply_tile<sizeof(Hidden) == 4>(acc, weights_of(step) + warp * 32 * kTilePitch, tokens_of(step));
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int expert = first_expert + warp * 32 + m * 16 + i / 2 * 8 + lane / 4;
        const int token = first_token + n * 8 + lane % 4 * 2 + i % 2;
        if (token < p.tokens && expert < p.num_experts) {
          parts.logits[((int64_t)blockIdx.y * p.tokens + token) * p.num_experts + expert] = acc[m][n][i];
        }
      }
    }
  }
  if (p.norm_weight == nullptr || blockIdx.z != 0) return;
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) squares += __shfl_xor_sync(kFullWarp, squares, offset);
  if (thread % 8 == 0 && my_token < p.tokens)
    parts.squares[(int64_t)blockIdx.y * p.tokens + my_token] = squares;
}

// grid: tokens.
template <bool kByRank>
__global__ void __launch_bounds__(kRouterThreads)
    router_choice_kernel(const __grid_constant__ RouterParams p, const __grid_constant__ RouterParts parts) {
  __shared__ Scratch<kByRank> scratch;
  const int token = blockIdx.x;
  const float bias = prepare_choice<kByRank>(p, scratch);
  wait_for_previous_kernel();
  allow_next_kernel();
  float factor = 1.0f;
  if (p.norm_weight != nullptr) {
    float squares = 0.0f;
    for (int s = 0; s < parts.splits; ++s) squares += parts.squares[(int64_t)s * p.tokens + token];
    factor = rsqrtf(squares / p.hidden_size + p.norm_eps);
  }
  auto logit = [&](int e) {
    float sum = 0.0f;
#pragma unroll 16
    for (int s = 0; s < parts.splits; ++s) {
      sum += parts.logits[((int64_t)s * p.tokens + token) * p.num_experts + e];
    }
    return sum * factor;
  };
  choose<kByRank>(p, token, scratch, bias, logit);
}

}  // namespace ringkernels::moe
