// A draw takes two or three kernels, in each of which several blocks share a row: the largest logit, sums over bins
// if there is a top-k or top-p, and the race. The last block of a row to finish its part of the race compares the
// tokens near the thresholds and combines.
#pragma once

#include "sample/digits.cuh"

namespace ringkernels {

__global__ void __launch_bounds__(kSampleThreads, kSampleBlocksPerSm)
measure_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleWorkspace workspace) {
  __shared__ uint64_t shared[kSampleThreads / 32];
  if (params.programmatic_launch) wait_for_previous_kernel();
  allow_next_kernel();
  const int index = blockIdx.y;
  const Row row = row_of(params, index);
  uint32_t bits = 0, id = 0;
  float least = INFINITY;
  Walk<2>(row, part_of_block(row.vocab_size)).run(row, [&](int first, const float (&logits)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t ordered = ordered_bits(logits[i]);
      if (ordered > bits) bits = ordered, id = first + i;
      if (isfinite(logits[i])) least = fminf(least, logits[i]);
    }
  });
  const uint64_t best = block_max(static_cast<uint64_t>(bits) << 32 | (0xffffffffu - id), shared);
  const uint64_t negative = block_max(ordered_bits(-least), shared);
  if (threadIdx.x == 0) workspace.extremes[index * gridDim.x + blockIdx.x] = {best, negative};
  if (workspace.counts == nullptr) return;
  for (int bin = blockIdx.x * kSampleThreads + threadIdx.x; bin < kBins; bin += gridDim.x * kSampleThreads) {
    workspace.counts[index * kBins + bin] = 0;
    workspace.weights[index * kBins + bin] = 0;
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) workspace.listed[index] = 0;
}

// Adds up counts and weights of the tokens in each bin.
__global__ void __launch_bounds__(kSampleThreads, kSampleBlocksPerSm)
histogram_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleWorkspace workspace) {
  __shared__ RowState state;
  // Shared memory adds 32 bits at a time; a block has at most 65,535 tokens (blocks_per_row), so that sums of 16
  // bits of their weights fit.
  __shared__ uint32_t counts[kBins], high[kBins], low[kBins];
  if (params.programmatic_launch) wait_for_previous_kernel();
  allow_next_kernel();
  const int index = blockIdx.y;
  Row row = row_of(params, index);
  Walk<1> walk(row, part_of_block(row.vocab_size));
  for (int bin = threadIdx.x; bin < kBins; bin += kSampleThreads) counts[bin] = high[bin] = low[bin] = 0;
  open_row(params, workspace.extremes + index * gridDim.x, index, row, state);
  const RowSettings& settings = state.settings;
  if (!state.draws() || !settings.filters()) return;
  const bool by_count = settings.top_k > 0, by_weight = settings.top_p < 1;
  walk.run(row, [&](int, const float (&logits)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (!row.in_range(logits[i])) continue;
      const int bin = row.bin_of(logits[i]);
      if (by_count) atomicAdd(counts + bin, 1u);
      if (!by_weight) continue;
      const float scaled = row.weight(logits[i]) * 65536.0f;  // of fixed_weight(), without 64-bit integers
      const auto whole = static_cast<uint32_t>(scaled);
      atomicAdd(high + bin, whole);
      atomicAdd(low + bin, static_cast<uint32_t>((scaled - static_cast<float>(whole)) * 65536.0f));
    }
  });
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kSampleThreads) {
    const unsigned long long weight = (static_cast<unsigned long long>(high[bin]) << 16) + low[bin];
    if (counts[bin] > 0) atomicAdd(workspace.counts + index * kBins + bin, counts[bin]);
    if (weight > 0) atomicAdd(workspace.weights + index * kBins + bin, weight);
  }
}

// Lets the tokens of a block race that are kept for sure, and lists those near the thresholds.
__device__ __forceinline__ void race_part(Walk<1>& walk, const Row& row, const RowSettings& settings, const Cut& cut,
                                          unsigned long long* list, uint32_t* listed, Race& race) {
  const int cut_first = cut.first, cut_last = cut.last, count_bin = cut.count_bin;
  const float min_p = settings.min_p;
  const uint64_t seed = settings.seed;
  const uint32_t position = settings.position;
  walk.run(row, [&](int first, const float (&logits)[4]) {
    float weights[4];
    bool any = false;
    unsigned near = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float own = row.weight(logits[i]);
      bool kept = row.in_range(logits[i]);
      if (cut_first < kBins && kept) {
        const int bin = row.bin_of(logits[i]);
        kept = bin < cut_first;
        near |= static_cast<unsigned>(!kept && (bin <= cut_last || bin == count_bin)) << i;
      }
      kept &= own >= min_p;
      weights[i] = kept ? own : 0.0f;
      any |= kept;
    }
    if (near != 0) {
      uint32_t place = atomicAdd(listed, static_cast<uint32_t>(__popc(near)));
#pragma unroll 1
      for (int i = 0; i < 4; ++i) {
        if ((near >> i & 1) == 0 || place >= kMaxListed) continue;
        list[place++] = packed_choice(select(logits, i), first + i);
      }
    }
    if (any) race.enter_group(first, weights, random_bits(seed, position, first / 4));
    race.share_bound();
  });
}

// Writes the token of a row; one thread calls it, when nobody reads the row's inputs any more.
__device__ __forceinline__ void choose_token(const SampleParams& params, const Row& row, int index, uint64_t best) {
  const uint32_t token = 0xffffffffu - static_cast<uint32_t>(best);
  params.tokens[index] = token;
  if (row.seen != nullptr) row.seen[token / 32] |= 1u << (token % 32);
  if (params.next_position != nullptr) ++params.next_position[index];
}

__global__ void __launch_bounds__(kSampleThreads, kSampleBlocksPerSm)
draw_kernel(const __grid_constant__ SampleParams params, const __grid_constant__ SampleWorkspace workspace) {
  __shared__ uint64_t shared[kSampleThreads / 32];
  __shared__ unsigned long long list[kMaxListed];
  __shared__ RowState state;
  __shared__ Cut cut;
  __shared__ bool last;
  if (params.programmatic_launch) wait_for_previous_kernel();
  allow_next_kernel();
  const int index = blockIdx.y;
  Row row = row_of(params, index);
  Walk<1> walk(row, part_of_block(row.vocab_size));
  open_row(params, workspace.extremes + index * gridDim.x, index, row, state);
  if (!state.draws()) {
    if (blockIdx.x == 0 && threadIdx.x == 0) choose_token(params, row, index, state.best);
    return;
  }
  const RowSettings& settings = state.settings;
  if (settings.filters()) {
    find_cut(settings, workspace.counts + index * kBins, workspace.weights + index * kBins, shared, cut);
  } else {
    if (threadIdx.x == 0) cut = keep_all(0);
    __syncthreads();
  }
  unsigned long long* near = workspace.list + static_cast<int64_t>(index) * kMaxListed;
  Race race;
  race_part(walk, row, settings, cut, near, workspace.listed + index, race);
  uint64_t best = block_max(race.best, shared);
  if (threadIdx.x == 0) {
    workspace.drawn[index * gridDim.x + blockIdx.x] = best;
    __threadfence();
    last = atomicAdd(workspace.arrived + index, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
#pragma unroll 1
  for (unsigned block = threadIdx.x; block < gridDim.x; block += kSampleThreads) {
    race.best = max(race.best, __ldcg(workspace.drawn + index * gridDim.x + block));
  }
  const uint32_t count = settings.filters() ? __ldcg(workspace.listed + index) : 0;
  if (count > kMaxListed) {
    race.best = race_by_digits(row, settings, list, shared, race);
  } else if (count > 0) {
    for (int i = threadIdx.x; i < static_cast<int>(count); i += kSampleThreads) {
      list[i] = __ldcg(near + i);
    }
    race_listed(row, settings, cut, list, count, shared, race);
  }
  best = block_max(race.best, shared);
  if (threadIdx.x > 0) return;
  workspace.arrived[index] = 0;
  choose_token(params, row, index, best);
}

}  // namespace ringkernels
