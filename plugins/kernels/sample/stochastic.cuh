// One block draws the token of one row. Thresholds are found digit by digit in histograms of integers (counts,
// and probabilities in fixed point), and the draw is an argmax over Gumbel noise: every sum is exact, so that the
// result does not depend on the order in which threads arrive.
#pragma once

#include <cuda_runtime.h>

#include "sample/greedy.cuh"

namespace ringkernels {

constexpr int kSampleThreads = 1024;

// Philox-4x32-10 (Salmon et al., 2011): a number for every (seed, position, token) without any state.
__device__ __forceinline__ float uniform_number(uint64_t seed, uint32_t position, uint32_t token) {
  uint32_t counter[4] = {token, position, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * counter[0], second = 0xCD9E8D57ull * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
#pragma unroll
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return (static_cast<float>(counter[0] >> 8) + 0.5f) * 0x1p-24f;  // inside (0, 1)
}

// The tokens that filters have left: those above a value, and of those at the value the ids below a limit.
struct Kept {
  uint32_t bits = 0;
  uint32_t id_limit = 0xffffffffu;

  __device__ bool operator()(uint32_t ordered, uint32_t id) const {
    return ordered > bits || (ordered == bits && id < id_limit);
  }
};

struct Row {
  const float* logits;
  int vocab_size;
  float largest;
  float temperature;
};

// What a token of some logit adds to a histogram.
struct Count {
  __device__ unsigned long long operator()(float) const { return 1; }
};
struct Probability {  // relative to the most likely token, in fixed point
  float largest;
  float temperature;

  __device__ unsigned long long operator()(float logit) const {
    return static_cast<unsigned long long>(expf((logit - largest) / temperature) * 0x1p32f);
  }
};

// Finds, from the most significant digit down, the largest key at which the amounts of all keys >= it reach
// `wanted`; what is above that key is returned in `above`. key_of(id, &key) says whether a token takes part.
template <typename KeyOf, typename Amount>
__device__ uint32_t find_key(const Row& row, uint64_t wanted, unsigned long long* histogram, uint64_t* above,
                             KeyOf key_of, Amount amount) {
  __shared__ uint32_t chosen;
  __shared__ uint64_t passed;
  uint32_t prefix = 0;
  *above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kSampleThreads) histogram[i] = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < row.vocab_size; id += kSampleThreads) {
      uint32_t key;
      if (!key_of(id, &key)) continue;
      if (shift < 24 && (key >> (shift + 8)) != (prefix >> (shift + 8))) continue;
      atomicAdd(histogram + (key >> shift & 255), amount(row.logits[id]));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      uint64_t sum = *above;
      int digit = 255;
      for (; digit > 0 && sum + histogram[digit] < wanted; --digit) sum += histogram[digit];
      chosen = digit;
      passed = sum;
    }
    __syncthreads();
    prefix |= chosen << shift;
    *above = passed;
    __syncthreads();
  }
  return prefix;
}

// Cuts `kept` down to the tokens at or above the key where amounts reach `wanted`, the lower ids among equals.
template <typename Amount>
__device__ Kept cut(const Row& row, const Kept& kept, uint64_t wanted, unsigned long long* histogram, Amount amount) {
  uint64_t above;
  const auto value_key = [&](int id, uint32_t* key) {
    *key = ordered_bits(row.logits[id]);
    return kept(*key, id);
  };
  const uint32_t bits = find_key(row, wanted, histogram, &above, value_key, amount);
  const uint64_t each = max(amount(from_ordered_bits(bits)), 1ull);
  const uint64_t needed = (wanted - above + each - 1) / each;
  const auto id_key = [&](int id, uint32_t* key) {
    *key = 0xffffffffu - id;
    return ordered_bits(row.logits[id]) == bits && kept(bits, id);
  };
  const uint32_t lowest = find_key(row, needed, histogram, &above, id_key, Count{});
  return Kept{bits, 0xffffffffu - lowest + 1};
}

// Applies top-k, then top-p to what it leaves.
__device__ Kept filtered(const Row& row, int top_k, float top_p, unsigned long long* histogram) {
  Kept kept;
  if (top_k > 0 && top_k < row.vocab_size) kept = cut(row, kept, top_k, histogram, Count{});
  if (top_p >= 1) return kept;
  const Probability probability{row.largest, row.temperature};
  unsigned long long mine = 0;
  for (int id = threadIdx.x; id < row.vocab_size; id += kSampleThreads) {
    if (kept(ordered_bits(row.logits[id]), id)) mine += probability(row.logits[id]);
  }
  if (threadIdx.x == 0) histogram[0] = 0;
  __syncthreads();
  atomicAdd(histogram, mine);
  __syncthreads();
  const double total = static_cast<double>(histogram[0]);
  __syncthreads();
  const unsigned long long wanted = max(1ull, static_cast<unsigned long long>(ceil(top_p * total)));
  return cut(row, kept, wanted, histogram, probability);
}

__global__ void __launch_bounds__(kSampleThreads) stochastic_kernel(const __grid_constant__ SampleParams params) {
  __shared__ unsigned long long histogram[256];
  __shared__ uint64_t shared[kSampleThreads / 32];
  if (params.programmatic_launch) wait_for_previous_kernel();
  allow_next_kernel();
  const int index = blockIdx.x;
  Row row{params.logits + index * params.row_stride, params.vocab_size, 0.0f, params.temperature[index]};
  uint64_t best = 0;
  for (int id = threadIdx.x; id < row.vocab_size; id += kSampleThreads) {
    const uint64_t choice = packed_choice(row.logits[id], id);
    best = choice > best ? choice : best;
  }
  best = block_max(best, shared);
  if (row.temperature > 0) {
    row.largest = from_ordered_bits(static_cast<uint32_t>(best >> 32));
    const Kept kept = filtered(row, params.top_k[index], params.top_p[index], histogram);
    const float least = params.min_p[index];
    best = 0;
    for (int id = threadIdx.x; id < row.vocab_size; id += kSampleThreads) {
      const float value = row.logits[id];
      const float scaled = (value - row.largest) / row.temperature;
      if (!kept(ordered_bits(value), id) || expf(scaled) < least) continue;
      const float uniform = uniform_number(params.seed[index], params.position[index], id);
      const uint64_t choice = packed_choice(scaled - logf(-logf(uniform)), id);
      best = choice > best ? choice : best;
    }
    best = block_max(best, shared);
  }
  if (threadIdx.x > 0) return;
  params.tokens[index] = 0xffffffffu - static_cast<uint32_t>(best);
  if (params.next_position != nullptr) ++params.next_position[index];
}

}  // namespace ringkernels
