// From the logits of one token to its experts: sigmoid, bias, grouped top-k, weights. One block per token.
#pragma once

#include <cfloat>
#include <climits>

#include "common/vec.cuh"
#include "ringkernels/moe.h"

namespace ringkernels::moe {

constexpr int kMaxExperts = 1024;
constexpr int kMaxGroups = 32;
constexpr int kMaxTopK = 32;
constexpr int kRouterThreads = 256;
constexpr unsigned kFullWarp = 0xffffffffu;

// Unsigned keys in the order of the floats; 0 is below all of them and means "not a candidate".
__device__ __forceinline__ uint32_t ordered_key(float value) {
  const uint32_t bits = __float_as_uint(value);
  return max(1u, bits ^ ((bits >> 31) ? 0xffffffffu : 0x80000000u));
}
__device__ __forceinline__ float value_of_key(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) ? 0x80000000u : 0xffffffffu));
}

constexpr int kRankGroups = kRouterThreads / 32;  // of choose_by_rank: a warp each

// Signed keys in the order of the floats; the same bits change on the way back.
__device__ __forceinline__ int signed_key(float value) {
  const int bits = __float_as_int(value);
  return bits ^ ((bits >> 31) & INT_MAX);
}
__device__ __forceinline__ float value_of_signed_key(int key) {
  return __int_as_float(key ^ ((key >> 31) & INT_MAX));
}

// Of choose_experts.
struct ChoiceScratch {
  uint32_t key[kMaxExperts];
  float score[kMaxExperts];
  float strength[kMaxGroups];
};

// Of choose_by_rank.
struct RankScratch {
  alignas(16) float biased[kRouterThreads];
  alignas(16) float group[kRankGroups];  // strengths
  int second[kRankGroups];               // keys of the second best
  // The best of the open groups, by group and id.
  alignas(16) float candidate[32];
  float candidate_score[32];
  int candidate_id[32];
  // By rank.
  alignas(16) float chosen_score[32];
  int chosen_id[32];
};

constexpr float kNobody = -__builtin_huge_valf();  // below every value: nothing to rank
constexpr float kLeastRank = -1e30f;               // the sum of two is above kNobody

// What an expert is ranked by. A NaN would leave ranks empty: it comes last, as in the contract.
__device__ __forceinline__ float rank_value(float score, float bias) {
  return fmaxf(score + bias, kLeastRank);
}

// How many of 32 values in shared memory come before this lane's; ties to the lower lane.
__device__ __forceinline__ int rank_of(float value, const float* values) {
  const int lane = threadIdx.x % 32;
  float greater[4] = {};  // four short chains of additions
#pragma unroll
  for (int other = 0; other < 32; other += 4) {
    const float4 four = *reinterpret_cast<const float4*>(values + other);
    const float theirs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float one;
      asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(theirs[i]), "f"(value));
      greater[i] += one;
    }
  }
  int rank = static_cast<int>((greater[0] + greater[1]) + (greater[2] + greater[3]));
  // Equal values have the same rank so far, which makes the sum of all too small. They are rare.
  if (__reduce_add_sync(kFullWarp, rank) != 31 * 32 / 2) {
#pragma unroll 1
    for (int other = 0; other < lane; ++other) rank += values[other] == value;
  }
  return rank;
}

// The sum of the two best biased scores of a group, found by one warp.
__device__ __forceinline__ float group_strength(const uint32_t* keys, int size) {
  const int lane = threadIdx.x % 32;
  uint32_t first = 0, second = 0;
  for (int e = lane; e < size; e += 32) {
    const uint32_t key = keys[e];
    second = max(second, min(first, key));
    first = max(first, key);
  }
  const uint32_t best = __reduce_max_sync(kFullWarp, first);
  const int owner = __ffs(__ballot_sync(kFullWarp, first == best)) - 1;
  const uint32_t next = __reduce_max_sync(kFullWarp, lane == owner ? second : first);
  return value_of_key(best) + (size > 1 ? value_of_key(next) : 0.0f);
}

// Bit g: group g is among the topk_group strongest, ties to the lower group. One warp.
__device__ __forceinline__ uint32_t open_groups(const float* strength, int n_group, int topk_group) {
  const int lane = threadIdx.x % 32;
  const float mine = lane < n_group ? strength[lane] : -FLT_MAX;
  int rank = 0;
#pragma unroll 8
  for (int other = 0; other < n_group; ++other) {
    const float theirs = strength[other];
    rank += theirs > mine || (theirs == mine && other < lane);
  }
  return __ballot_sync(kFullWarp, lane < n_group && rank < topk_group);
}

// The top_k candidates by falling key, ties to the lower id: lane i gets the i-th. kSlots * 32 >=
// num_experts.
template <int kSlots>
__device__ __forceinline__ int pick_experts(const uint32_t* shared_keys, int num_experts, int per_group,
                                            int top_k, uint32_t groups) {
  const int lane = threadIdx.x % 32;
  uint32_t keys[kSlots];
#pragma unroll
  for (int j = 0; j < kSlots; ++j) {
    const int e = lane + 32 * j;
    keys[j] = e < num_experts && (groups >> (e / per_group) & 1) ? shared_keys[e] : 0;
  }
  int mine = 0;
  for (int pick = 0; pick < top_k; ++pick) {
    uint32_t best = 0;
    int slot = 0;
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (keys[j] > best) best = keys[j], slot = j;
    }
    const uint32_t top = __reduce_max_sync(kFullWarp, best);
    const int id = __reduce_min_sync(kFullWarp, best == top ? (unsigned)(lane + 32 * slot) : ~0u);
#pragma unroll
    for (int j = 0; j < kSlots; ++j) {
      if (id == lane + 32 * j) keys[j] = 0;
    }
    if (lane == pick) mine = id;
  }
  return mine;
}

// Whether choose_by_rank serves: a warp per group, and the best of the open groups fit one warp.
__host__ __device__ inline bool ranks_serve(const RouterParams& p) {
  return p.num_experts <= kRouterThreads && p.num_experts == p.n_group * 32 && p.topk_group * p.top_k <= 32;
}

// Before choose_by_rank, by the first warp: what nobody writes comes behind everything, no two alike.
__device__ __forceinline__ void clear_ranks(const RouterParams& p, RankScratch& scratch) {
  const int thread = threadIdx.x;
  if (thread >= 32) return;
  if (thread >= p.n_group && thread < kRankGroups) {
    scratch.group[thread] = kNobody;
    scratch.second[thread] = INT_MAX;
  }
  scratch.candidate[thread] = (20 + thread) * (kLeastRank / 10.0f);
  scratch.candidate_score[thread] = 0.0f;
  scratch.candidate_id[thread] = thread;
  scratch.chosen_score[thread] = 0.0f;
}

// Bit g: group g is among the topk_group strongest, ties to the lower group; *least: the smallest of their
// second keys. Every lane compares two groups, 2 (lane / 8) and the next, with group lane % 8.
__device__ __forceinline__ uint32_t strongest_groups(const RankScratch& scratch, int topk_group, int* least) {
  static_assert(kRankGroups == 8);
  const int group = threadIdx.x % 8, other = threadIdx.x % 32 / 8 * 2;
  const float mine = scratch.group[group];
  const float2 theirs = *reinterpret_cast<const float2*>(scratch.group + other);
  const int second = scratch.second[group];
  const uint32_t of_group = 0x01010101u << group;
  const uint32_t even = __ballot_sync(kFullWarp, theirs.x > mine || (theirs.x == mine && other < group));
  const uint32_t odd = __ballot_sync(kFullWarp, theirs.y > mine || (theirs.y == mine && other + 1 < group));
  const bool open = __popc(even & of_group) + __popc(odd & of_group) < topk_group;
  *least = __reduce_min_sync(kFullWarp, open ? second : INT_MAX);
  return __ballot_sync(kFullWarp, open) & 0xff;
}

// As choose_experts: each warp finds the two best of its group; then all warps know the open groups, and that
// nobody below the second best of any of them is chosen, so that few are left for the first warp to rank.
// logit: of expert threadIdx.x.
__device__ __forceinline__ void choose_by_rank(const RouterParams& p, int token, RankScratch& scratch,
                                               float bias, float logit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float score = 1.0f / (1.0f + expf(-logit)), biased = rank_value(score, bias);
  const int key = signed_key(biased);
  if (warp < p.n_group) {
    scratch.biased[threadIdx.x] = biased;
    const int best = __reduce_max_sync(kFullWarp, key);
    const uint32_t owners = __ballot_sync(kFullWarp, key == best);
    int second = __reduce_max_sync(kFullWarp, key == best ? INT_MIN : key);
    if (owners & (owners - 1)) second = best;
    if (lane == 0) {
      scratch.group[warp] = value_of_signed_key(best) + value_of_signed_key(second);
      scratch.second[warp] = second;
    }
  }
  __syncthreads();
  int least;
  const uint32_t open = strongest_groups(scratch, p.topk_group, &least);
  if (2 * p.topk_group < p.top_k) least = INT_MIN;
  if (open >> warp & 1) {
    bool candidate = key >= least;
    uint32_t candidates = __ballot_sync(kFullWarp, candidate);
    if (__popc(candidates) > p.top_k) {
      candidate = rank_of(biased, scratch.biased + warp * 32) < p.top_k;
      candidates = __ballot_sync(kFullWarp, candidate);
    }
    if (candidate) {
      const int place =
          __popc(open & ((1u << warp) - 1)) * p.top_k + __popc(candidates & ((1u << lane) - 1));
      scratch.candidate[place] = biased;
      scratch.candidate_score[place] = score;
      scratch.candidate_id[place] = threadIdx.x;
    }
  }
  __syncthreads();
  if (warp != 0) return;
  const float my_score = scratch.candidate_score[lane];
  const int my_id = scratch.candidate_id[lane];
  const int rank = rank_of(scratch.candidate[lane], scratch.candidate);
  if (rank < p.top_k) {
    scratch.chosen_score[rank] = my_score;
    scratch.chosen_id[rank] = my_id;
  }
  __syncwarp();
  if (lane >= p.top_k) return;
  float weight = scratch.chosen_score[lane];
  if (p.normalize) {
    auto sum_of_eight = [&](int first) {
      const float4 a = *reinterpret_cast<const float4*>(scratch.chosen_score + first);
      const float4 b = *reinterpret_cast<const float4*>(scratch.chosen_score + first + 4);
      return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    };
    float sum = sum_of_eight(0);
#pragma unroll 1  // one branch where eight are chosen
    for (int first = 8; first < p.top_k; first += 8) sum += sum_of_eight(first);
    weight = __fdividef(weight, sum + 1e-20f);
  }
  p.expert_ids[(int64_t)token * p.top_k + lane] = scratch.chosen_id[lane];
  p.routing_weights[(int64_t)token * p.top_k + lane] = weight * p.routed_scaling_factor;
}

// Called by a whole block; logit(e) is called once for each expert. Whatever the logits and the bias are, a
// token gets top_k different experts: all ranks are of numbers, and every choice is of as many as there are.
template <typename Logit>
__device__ __forceinline__ void choose_experts(const RouterParams& p, int token, ChoiceScratch& scratch,
                                               Logit logit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int per_group = p.num_experts / p.n_group;
  for (int e = threadIdx.x; e < p.num_experts; e += kRouterThreads) {
    const float bias = p.expert_bias[e];
    const float score = 1.0f / (1.0f + expf(-logit(e)));
    scratch.score[e] = score;
    scratch.key[e] = ordered_key(rank_value(score, bias));
  }
  __syncthreads();
  uint32_t groups = kFullWarp;
  if (p.topk_group < p.n_group) {
    for (int g = warp; g < p.n_group; g += kRouterThreads / 32) {
      const float strength = group_strength(scratch.key + g * per_group, per_group);
      if (lane == 0) scratch.strength[g] = strength;
    }
    __syncthreads();
  }
  if (warp != 0) return;
  if (p.topk_group < p.n_group) groups = open_groups(scratch.strength, p.n_group, p.topk_group);
  const int id = p.num_experts <= 256
                     ? pick_experts<8>(scratch.key, p.num_experts, per_group, p.top_k, groups)
                     : pick_experts<kMaxExperts / 32>(scratch.key, p.num_experts, per_group, p.top_k, groups);
  const bool chosen = lane < p.top_k;
  float weight = chosen ? scratch.score[id] : 0.0f;
  if (p.normalize) weight = __fdividef(weight, warp_sum(weight) + 1e-20f);
  if (!chosen) return;
  p.expert_ids[(int64_t)token * p.top_k + lane] = id;
  p.routing_weights[(int64_t)token * p.top_k + lane] = weight * p.routed_scaling_factor;
}

}  // namespace ringkernels::moe
