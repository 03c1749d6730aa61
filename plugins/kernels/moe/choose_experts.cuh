// From the logits of one token to its experts: sigmoid, bias, grouped top-k, weights. One block per token.
#pragma once

#include <cfloat>

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

struct ChoiceScratch {
  alignas(16) uint32_t key[kMaxExperts];
  float score[kMaxExperts];
  float strength[kMaxGroups];
  // The best of the open groups, by group and rank.
  alignas(16) float candidate[32];
  float candidate_score[32];
  int candidate_id[32];
  alignas(16) float group[kMaxGroups];  // strengths
  alignas(16) float biased[kRouterThreads];
};

constexpr float kNobody = -__builtin_huge_valf();  // below every value: nothing to rank

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
  // Equal values have the same rank so far. They are rare.
  const unsigned there = __ballot_sync(kFullWarp, value != kNobody);
  if (__popc(__reduce_or_sync(kFullWarp, value != kNobody ? 1u << rank : 0u)) != __popc(there)) {
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

// Writes the choice of a token: lane i < top_k has the i-th expert. One warp.
__device__ __forceinline__ void write_choice(const RouterParams& p, int token, int rank, bool chosen, int id,
                                             float score) {
  float weight = chosen ? score : 0.0f;
  if (p.normalize) weight = weight / (warp_sum(weight) + 1e-20f);
  if (chosen) {
    p.expert_ids[(int64_t)token * p.top_k + rank] = id;
    p.routing_weights[(int64_t)token * p.top_k + rank] = weight * p.routed_scaling_factor;
  }
}

// Whether choose_by_rank serves: a warp per group, and the best of the open groups fit one warp.
__host__ __device__ inline bool ranks_serve(const RouterParams& p) {
  return p.num_experts <= kRouterThreads && p.num_experts == p.n_group * 32 && p.topk_group * p.top_k <= 32;
}

// Before choose_by_rank, by the first warp.
__device__ __forceinline__ void clear_ranks(const RouterParams& p, ChoiceScratch& scratch) {
  const int thread = threadIdx.x;
  if (thread >= 32) return;
  if (thread >= p.n_group) scratch.group[thread] = kNobody;
  scratch.candidate[thread] = kNobody;
  scratch.candidate_score[thread] = 0.0f;
  scratch.candidate_id[thread] = thread;
}

// As choose_experts: each warp ranks its group, then all groups, the first warp the best of the open ones.
// logit: of expert threadIdx.x.
__device__ __forceinline__ void choose_by_rank(const RouterParams& p, int token, ChoiceScratch& scratch,
                                               float bias, float logit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float score = 1.0f / (1.0f + expf(-logit)), biased = score + bias;
  int rank = 32;
  if (warp < p.n_group) {
    scratch.biased[threadIdx.x] = biased;
    __syncwarp();
    rank = rank_of(biased, scratch.biased + warp * 32);
    const float best = __shfl_sync(kFullWarp, biased, __ffs(__ballot_sync(kFullWarp, rank == 0)) - 1);
    const float next = __shfl_sync(kFullWarp, biased, __ffs(__ballot_sync(kFullWarp, rank == 1)) - 1);
    if (lane == 0) scratch.group[warp] = best + next;
  }
  __syncthreads();
  const float strength = scratch.group[lane];
  const int order = rank_of(strength, scratch.group);
  const unsigned open = __ballot_sync(kFullWarp, lane < p.n_group && order < p.topk_group);
  if ((open >> warp & 1) && rank < p.top_k) {
    const int place = __popc(open & ((1u << warp) - 1)) * p.top_k + rank;
    scratch.candidate[place] = biased;
    scratch.candidate_score[place] = score;
    scratch.candidate_id[place] = threadIdx.x;
  }
  __syncthreads();
  if (warp != 0) return;
  // Candidates are by group and rank, so that equal ones stay by id.
  const int place = rank_of(scratch.candidate[lane], scratch.candidate);
  write_choice(p, token, place, lane < p.topk_group * p.top_k && place < p.top_k, scratch.candidate_id[lane],
               scratch.candidate_score[lane]);
}

// Called by a whole block; logit(e) is called once for each expert.
template <typename Logit>
__device__ __forceinline__ void choose_experts(const RouterParams& p, int token, ChoiceScratch& scratch,
                                               Logit logit) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int per_group = p.num_experts / p.n_group;
  for (int e = threadIdx.x; e < p.num_experts; e += kRouterThreads) {
    const float bias = p.expert_bias[e];
    const float score = 1.0f / (1.0f + expf(-logit(e)));
    scratch.score[e] = score;
    scratch.key[e] = ordered_key(score + bias);
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
  write_choice(p, token, lane, chosen, id, chosen ? scratch.score[id] : 0.0f);
}

}  // namespace ringkernels::moe
