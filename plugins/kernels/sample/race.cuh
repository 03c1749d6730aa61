// Draws a token: each that is left runs for an exponential time over its weight, and the first one wins. That is
// the argmax over Gumbel noise without a logarithm for those that have lost already.
#pragma once

#include "sample/greedy.cuh"

namespace ringkernels {

// Philox-4x32-10 (Salmon et al., 2011): numbers for every (seed, position, group of four tokens) without any state.
__device__ __forceinline__ uint4 random_bits(uint64_t seed, uint32_t position, uint32_t group) {
  uint32_t counter[4] = {group, position, 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll 2
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = 0xD2511F53ull * counter[0], second = 0xCD9E8D57ull * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
#pragma unroll
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return make_uint4(counter[0], counter[1], counter[2], counter[3]);
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int index) {
  return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// An element of what is held in registers.
__device__ __forceinline__ float select(const float (&four)[4], int index) {
  return index == 0 ? four[0] : index == 1 ? four[1] : index == 2 ? four[2] : four[3];
}

// Inside (0, 1], and exact where it is small: there the race is won.
__device__ __forceinline__ float uniform_number(uint32_t bits) {
  return fmaf(__uint2float_rn(bits), 0x1p-32f, 0x1p-33f);
}

struct Race {
  uint64_t best = 0;  // above: the complement of the time; below: that of the id
  float bound = 3.4028235e38f;  // of times that can still win

  __device__ __forceinline__ void enter(uint32_t id, float weight, uint32_t bits) {
    const float below_one = fminf(uniform_number(bits), 0x1.fffffep-1f);
    const float time = __fdividef(-log1pf(-below_one), weight);
    const uint64_t choice = static_cast<uint64_t>(0xffffffffu - __float_as_uint(time)) << 32 | (0xffffffffu - id);
    if (choice > best) {
      best = choice;
      bound = time * 1.00001f;  // what rounding could change is computed: the result is that of any split of the row
    }
  }

  // Tokens without a weight do not take part.
  __device__ __forceinline__ void enter_group(uint32_t first, const float (&weights)[4], const uint4& bits) {
    bool open = false;
    // -log(1 - u) >= u: most have lost without their logarithm.
#pragma unroll
    for (int i = 0; i < 4; ++i) open |= uniform_number(word_of(bits, i)) <= bound * weights[i];
    if (!open) return;
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const float weight = select(weights, i);
      if (weight > 0) enter(first + i, weight, word_of(bits, i));
    }
  }

  // Takes over the bound of the warp; all its threads call it.
  __device__ __forceinline__ void share_bound() {
    bound = __uint_as_float(__reduce_min_sync(0xffffffffu, __float_as_uint(bound)));
  }
};

}  // namespace ringkernels
