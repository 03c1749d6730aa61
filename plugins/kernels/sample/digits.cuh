// Thresholds of a row by one block, digit by digit: for rows with more equal or nearly equal tokens at a threshold
// than the list holds.
#pragma once

#include "sample/thresholds.cuh"

namespace ringkernels {

// The tokens that filters have left: those above a value, and of those at the value the ids below a limit.
struct Kept {
  uint32_t bits = 0;
  uint32_t id_limit = 0xffffffffu;

  __device__ bool operator()(uint32_t ordered, uint32_t id) const {
    return ordered > bits || (ordered == bits && id < id_limit);
  }
};

// What a token of some logit adds to a sum.
struct Count {
  __device__ unsigned long long operator()(float) const { return 1; }
};
struct Weight {
  const Row& row;

  __device__ unsigned long long operator()(float logit) const { return row.fixed_weight(logit); }
};

// Finds, from the most significant digit down, the largest key at which the amounts of all keys >= it reach
// `wanted`; what is above that key is returned in `above`. key_of(id, logit, &key) says whether a token takes part.
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
    Walk<1>(row, whole_row(row.vocab_size)).run(row, [&](int first, const float (&logits)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t key;
        if (first + i >= row.vocab_size || !key_of(first + i, logits[i], &key)) continue;
        if (shift < 24 && (key >> (shift + 8)) != (prefix >> (shift + 8))) continue;
        atomicAdd(histogram + (key >> shift & 255), amount(logits[i]));
      }
    });
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
__device__ Kept cut_by_digits(const Row& row, const Kept& kept, uint64_t wanted, unsigned long long* histogram,
                              Amount amount) {
  uint64_t above;
  const auto value_key = [&](int id, float logit, uint32_t* key) {
    *key = ordered_bits(logit);
    return kept(*key, id);
  };
  const uint32_t bits = find_key(row, wanted, histogram, &above, value_key, amount);
  const uint64_t each = max(amount(from_ordered_bits(bits)), 1ull);
  const uint64_t needed = (wanted - above + each - 1) / each;
  const auto id_key = [&](int id, float logit, uint32_t* key) {
    *key = 0xffffffffu - id;
    return ordered_bits(logit) == bits && kept(bits, id);
  };
  const uint32_t lowest = find_key(row, needed, histogram, &above, id_key, Count{});
  return Kept{bits, 0xffffffffu - lowest + 1};
}

// Lets all tokens of a row race that the filter leaves; returns the best of this thread. Everything by value: what
// has an address is not held in registers by the caller either.
__device__ __noinline__ uint64_t race_by_digits(Row row, RowSettings settings, unsigned long long* histogram,
                                                uint64_t* shared, Race race) {
  Kept kept;
  if (settings.top_k > 0) kept = cut_by_digits(row, kept, settings.top_k, histogram, Count{});
  if (settings.top_p < 1) {
    uint64_t weight = 0;
    Walk<1>(row, whole_row(row.vocab_size)).run(row, [&](int first, const float (&logits)[4]) {
      for (int i = 0; i < 4; ++i) {
        if (kept(ordered_bits(logits[i]), first + i)) weight += row.fixed_weight(logits[i]);
      }
    });
    kept = cut_by_digits(row, kept, settings.wanted(block_scan(weight, shared).total), histogram, Weight{row});
  }
  Walk<1>(row, whole_row(row.vocab_size)).run(row, [&](int first, const float (&logits)[4]) {
    float weights[4];
    for (int i = 0; i < 4; ++i) {
      const float own = row.weight(logits[i]);
      const bool left = row.in_range(logits[i]) && kept(ordered_bits(logits[i]), first + i);
      weights[i] = left && own >= settings.min_p ? own : 0.0f;
    }
    race.enter_group(first, weights, random_bits(settings.seed, settings.position, first / 4));
  });
  return race.best;
}

}  // namespace ringkernels
