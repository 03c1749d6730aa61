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
  alignas(16) uint32_t candidate[32];
  float score[kMaxExperts];
  // The best of each group, by group and rank.
  uint32_t best_key[kRouterThreads];
  float best_score[kRouterThreads];
  int best_id[kRouterThreads];
  float strength[kMaxGroups];
};

// How many of 32 keys in shared memory come before this lane's; ties to the lower lane.
__device__ __forceinline__ int rank_of(uint32_t key, const uint32_t* keys) {
  const int lane = threadIdx.x % 32;
  int rank = 0;
#pragma unroll
  for (int other = 0; other < 32; other += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(keys + other);
    rank += four.x > key || (four.x == key && other < lane);
    rank += four.y > key || (four.y == key && other + 1 < lane);
    rank += four.z > key || (four.z == key && other + 2 < lane);
    rank += four.w > key || (four.w == key && other + 3 < lane);
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

// Which of the best of the open groups a lane of the first warp ranks: the `place`-th of the `group`-th.
struct Candidate {
  int group;
  int place;

  // Long divisions: made before the wait for the kernel before, where they cost nothing.
  __device__ __forceinline__ explicit Candidate(const RouterParams& p) {
    const int lane = threadIdx.x % 32;
    group = lane / p.top_k, place = lane % p.top_k;
    asm volatile("" : "+r"(group), "+r"(place));  // here, not where they are used
  }
};

// As choose_experts, with one barrier: each warp ranks its group, the first warp ranks the best of the open
// groups. logit: of expert threadIdx.x.
__device__ __forceinline__ void choose_by_rank(const RouterParams& p, int token, ChoiceScratch& scratch,
                                               float bias, float logit, const Candidate& mine) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < p.n_group) {
    const float score = 1.0f / (1.0f + expf(-logit)), biased = score + bias;
    const uint32_t key = ordered_key(biased);
    scratch.key[threadIdx.x] = key;
    __syncwarp();
    const int rank = rank_of(key, scratch.key + warp * 32);
    if (rank < p.top_k) {
      const int place = warp * 32 + rank;
      scratch.best_key[place] = key;
      scratch.best_score[place] = score;
      scratch.best_id[place] = threadIdx.x;
    }
    const float best = __shfl_sync(kFullWarp, biased, __ffs(__ballot_sync(kFullWarp, rank == 0)) - 1);
    const float next = __shfl_sync(kFullWarp, biased, __ffs(__ballot_sync(kFullWarp, rank == 1)) - 1);
    if (lane == 0) scratch.strength[warp] = best + next;
  }
  __syncthreads();
  if (warp != 0) return;
  uint32_t groups = open_groups(scratch.strength, p.n_group, p.topk_group);
  const bool candidate = mine.group < p.topk_group;
  for (int skip = candidate ? mine.group : 0; skip > 0; --skip) groups &= groups - 1;
  const int place = candidate ? (__ffs(groups) - 1) * 32 + mine.place : 0;
  // Candidates are by group and rank, so that equal keys stay by id.
  const uint32_t key = candidate ? scratch.best_key[place] : 0;
  scratch.candidate[lane] = key;
  __syncwarp();
  const int rank = rank_of(key, scratch.candidate);
  write_choice(p, token, rank, candidate && rank < p.top_k, scratch.best_id[place],
               scratch.best_score[place]);
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
