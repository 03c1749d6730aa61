// Which tokens top-k and top-p leave. All sums are of integers (counts, and weights in fixed point), so that the
// result does not depend on the order in which threads arrive.
#pragma once

#include "sample/race.cuh"
#include "sample/row.cuh"

namespace ringkernels {

// What the sums over bins say of the thresholds: tokens before `first` are kept, those from `first` to `last` (where
// top-p may end) and in `count_bin` (where top-k ends) have to be compared one by one, and others are not kept.
struct Cut {
  int first, last;
  int count_bin;                 // -1: top-k leaves all that are in range
  uint32_t count_before;         // tokens before count_bin
  uint64_t weight_before;        // of all before `first`
  uint64_t weight_before_count;  // of all before count_bin; of all tokens if there is none
  uint64_t weight_through_count;
};

__device__ __forceinline__ Cut keep_all(uint64_t weight) { return {kBins, kBins, -1, 0, 0, weight, weight}; }

// Writes `cut`, in shared memory.
__device__ __forceinline__ void find_cut(const RowSettings& settings, const uint32_t* counts,
                                         const unsigned long long* weights, uint64_t* shared, Cut& cut) {
  constexpr int kOwn = kBins / kSampleThreads;
  const int begin = threadIdx.x * kOwn;
  uint32_t own_count[kOwn];
  uint64_t own_weight[kOwn], count = 0, weight = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    count += own_count[i] = counts[begin + i];
    weight += own_weight[i] = weights[begin + i];
  }
  const uint64_t count_here = block_scan(count, shared).sum - count;
  const Scanned scanned = block_scan(weight, shared);
  const uint64_t weight_here = scanned.sum - weight;
  if (threadIdx.x == 0) cut = keep_all(scanned.total);
  __syncthreads();
  count = count_here, weight = weight_here;
  const auto top_k = static_cast<uint64_t>(settings.top_k);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (count < top_k && count + own_count[i] >= top_k) {
      cut.count_bin = begin + i;
      cut.count_before = static_cast<uint32_t>(count);
      cut.weight_before_count = weight;
      cut.weight_through_count = weight + own_weight[i];
    }
    count += own_count[i];
    weight += own_weight[i];
  }
  __syncthreads();
  const int count_bin = cut.count_bin;
  if (settings.top_p < 1) {
    // The total that top-p takes a part of lies between these: where the top-k threshold is inside its bin decides.
    const uint64_t low = settings.wanted(cut.weight_before_count);
    const uint64_t high = settings.wanted(cut.weight_through_count);
    weight = weight_here;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint64_t through = weight + own_weight[i];
      if (weight < low && through >= low) cut.first = begin + i, cut.weight_before = weight;
      if (weight < high && through >= high) cut.last = begin + i;
      weight = through;
    }
  } else if (threadIdx.x == 0 && count_bin >= 0) {
    cut.first = cut.last = count_bin;
  }
  __syncthreads();
}

// Sorts packed choices in shared memory, the best first; pads with zeros up to a power of two.
__device__ __forceinline__ void sort_descending(unsigned long long* list, int count) {
  int padded = 1;
  while (padded < count) padded *= 2;
  for (int i = count + threadIdx.x; i < padded; i += kSampleThreads) list[i] = 0;
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll 1
      for (int i = threadIdx.x; i < padded / 2; i += kSampleThreads) {
        const int low = 2 * i - (i & (stride - 1)), high = low + stride;
        const unsigned long long left = list[low], right = list[high];
        if ((left < right) == ((low & size) == 0)) list[low] = right, list[high] = left;
      }
      // With strides up to 32 a warp has 64 places of its own.
      const int next = stride > 1 ? stride / 2 : size;
      if (stride > 32 || next > 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
  }
  __syncthreads();
}

// Lets those of `count` listed tokens race that the filter leaves. `list` is in shared memory.
__device__ __forceinline__ void race_listed(const Row& row, const RowSettings& settings, const Cut& cut,
                                            unsigned long long* list, int count, uint64_t* shared, Race& race) {
  sort_descending(list, count);
  const int share = (count + kSampleThreads - 1) / kSampleThreads;
  const int begin = threadIdx.x * share, end = min(begin + share, count);
  const auto logit_at = [&](int i) { return from_ordered_bits(static_cast<uint32_t>(list[i] >> 32)); };
  uint64_t at_edge = 0;
#pragma unroll 1
  for (int i = begin; i < end; ++i) at_edge += row.bin_of(logit_at(i)) == cut.count_bin;
  // Tokens of count_bin come last; of them only the first are among the top k.
  const int first_at_edge = count - static_cast<int>(block_scan(at_edge, shared).total);
  const int limit = cut.count_bin < 0 ? count : first_at_edge + settings.top_k - static_cast<int>(cut.count_before);
  uint64_t weight = 0, edge_weight = 0;
#pragma unroll 1
  for (int i = begin; i < min(end, limit); ++i) {
    const uint64_t own = row.fixed_weight(logit_at(i));
    weight += own;
    if (i >= first_at_edge) edge_weight += own;
  }
  uint64_t before = cut.weight_before + block_scan(weight, shared).sum - weight;
  const uint64_t wanted = settings.wanted(cut.weight_before_count + block_scan(edge_weight, shared).total);
#pragma unroll 1
  for (int i = begin; i < min(end, limit); ++i) {
    const float logit = logit_at(i);
    if (before >= wanted || row.bin_of(logit) > cut.last) break;
    const uint32_t id = 0xffffffffu - static_cast<uint32_t>(list[i]);
    const uint4 bits = random_bits(settings.seed, settings.position, id / 4);
    if (row.weight(logit) >= settings.min_p) race.enter(id, row.weight(logit), word_of(bits, id % 4));
    before += row.fixed_weight(logit);
  }
}

}  // namespace ringkernels
