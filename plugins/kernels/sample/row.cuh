// A row of logits as several blocks share it, and the measures of the row that the steps of a draw need.
#pragma once

#include <cuda_runtime.h>

#include "sample/greedy.cuh"

namespace ringkernels {

constexpr int kSampleThreads = kGreedyThreads;  // of block_max()
constexpr int kSampleBlocksPerSm = 3;
constexpr int kBins = 2048;
constexpr int kMaxListed = 2048;
// Units of temperature below the largest logit. Further down a token has no weight in fixed point (2^-32), and
// loses the race of race.cuh to the most likely token whatever their random numbers are.
constexpr float kUsefulRange = 26.0f;

// What one block found in its part of a row.
struct Extremes {
  uint64_t best;      // packed_choice() of the largest logit
  uint64_t negative;  // ordered bits of the smallest finite logit, negated
};

// Scratch of the stochastic kernels, each [rows, ...].
struct SampleWorkspace {
  uint32_t* arrived;            // blocks that have drawn, zero between launches
  uint32_t* listed;             // tokens in `list`, and those for which there was no room
  Extremes* extremes;           // [blocks]
  uint64_t* drawn;              // [blocks] the best of each block
  unsigned long long* weights;  // [kBins] sums in fixed point
  unsigned long long* list;     // [kMaxListed] packed_choice() of tokens near the thresholds
  uint32_t* counts;             // [kBins]
};

struct Row {
  const float* logits;
  uint32_t* seen;  // null without a penalty
  float penalty;
  int vocab_size;
  float largest;
  float range;  // tokens that are further below the largest are never chosen
  float bins_per_unit;
  float exponent;  // log2(e) / temperature

  // Ordered as the logits are, the largest first, whatever is rounded. Only of tokens in range.
  __device__ int bin_of(float logit) const {
    return min(static_cast<int>((largest - logit) * bins_per_unit), kBins - 1);
  }
  __device__ bool in_range(float logit) const { return largest - logit <= range; }
  // Relative to the most likely token. In range it is far from what flushing to zero could change.
  __device__ float weight(float logit) const {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"((logit - largest) * exponent));
    return result;
  }
  __device__ uint64_t fixed_weight(float logit) const {
    return static_cast<uint64_t>(weight(logit) * 0x1p32f);
  }
};

// Groups of four tokens: those of a block, or of a row.
struct Part {
  int begin, end;
};

__device__ __forceinline__ Part whole_row(int vocab_size) { return {0, (vocab_size + 3) / 4}; }

__device__ __forceinline__ Part part_of_block(int vocab_size) {
  const Part row = whole_row(vocab_size);
  const int share = (row.end + gridDim.x - 1) / gridDim.x;
  const int begin = min(static_cast<int>(blockIdx.x) * share, row.end);
  return {begin, min(begin + share, row.end)};
}

// All loads of a row's settings start at once: one after the other they would take longer than anything else.
struct RowSettings {
  float temperature, top_p, min_p;
  int top_k;
  uint32_t position;
  uint64_t seed;

  __device__ bool filters() const { return top_k > 0 || top_p < 1; }
  // What the weights of kept tokens have to reach together.
  __device__ uint64_t wanted(uint64_t total) const {
    if (top_p >= 1) return ~0ull;
    return max(1ull, static_cast<unsigned long long>(ceil(top_p * static_cast<double>(total))));
  }
};

__device__ __forceinline__ RowSettings settings_of(const SampleParams& params, int index) {
  RowSettings settings;
  settings.temperature = params.temperature[index];
  settings.top_k = params.top_k == nullptr ? 0 : params.top_k[index];
  settings.top_p = params.top_p == nullptr ? 1.0f : params.top_p[index];
  settings.min_p = params.min_p == nullptr ? 0.0f : params.min_p[index];
  settings.position = static_cast<uint32_t>(params.position[index]);
  settings.seed = static_cast<uint64_t>(params.seed[index]);
  if (settings.top_k >= params.vocab_size) settings.top_k = 0;
  return settings;
}

// Where a row lies; open_row() completes it.
__device__ __forceinline__ Row row_of(const SampleParams& params, int index) {
  Row row{};
  row.logits = params.logits + index * params.row_stride;
  row.vocab_size = params.vocab_size;
  if (params.penalty != nullptr) {
    row.penalty = params.penalty[index];
    const int64_t slot = params.seen_slot[index];
    if (row.penalty != 1.0f) row.seen = params.seen + slot * ((params.vocab_size + 31) / 32);
  }
  return row;
}

struct Group {
  float logits[4];
  uint32_t seen;  // a bit for each
};

// Tokens beyond the end of a part are -inf.
__device__ __forceinline__ Group load_group(const Row& row, const Part& part, int group) {
  float4 four = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
  const int id = 4 * group;
  uint32_t seen = 0;
  if (group < part.end) {
    if (id + 4 <= row.vocab_size) {
      four = *reinterpret_cast<const float4*>(row.logits + id);
    } else {
      four.x = row.logits[id];
      if (id + 1 < row.vocab_size) four.y = row.logits[id + 1];
      if (id + 2 < row.vocab_size) four.z = row.logits[id + 2];
    }
    if (row.seen != nullptr) seen = row.seen[id / 32] >> (id % 32) & 15;
  }
  return {{four.x, four.y, four.z, four.w}, seen};
}

// Few tokens have been seen: the division need not be in every loop.
__device__ __noinline__ float penalized(float logit, float penalty) {
  return logit > 0 ? logit / penalty : logit * penalty;
}

__device__ __forceinline__ void penalize(const Row& row, Group& group) {
  if (group.seen == 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (group.seen >> i & 1) group.logits[i] = penalized(group.logits[i], row.penalty);
  }
}

// The groups of a part that a thread visits, kAhead of them loaded before they are needed.
template <int kAhead>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Row& row, const Part& part) : part_(part) { load(row, part.begin); }

  // Calls visit(first id, four logits). All threads make the same number of calls.
  template <typename Visit>
  __device__ __forceinline__ void run(const Row& row, Visit visit) {
    for (int base = part_.begin; base < part_.end; base += kAhead * kSampleThreads) {
      Group now[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) now[i] = next_[i];
      load(row, base + kAhead * kSampleThreads);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        penalize(row, now[i]);
        visit(4 * (base + i * kSampleThreads + static_cast<int>(threadIdx.x)), now[i].logits);
      }
    }
  }

 private:
  __device__ __forceinline__ void load(const Row& row, int base) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) next_[i] = load_group(row, part_, base + i * kSampleThreads + threadIdx.x);
  }

  Part part_;
  Group next_[kAhead];
};

// What a block knows of its row, in shared memory.
struct RowState {
  RowSettings settings;
  uint64_t best;  // of all tokens
  float largest, range, bins_per_unit, exponent;

  // Otherwise the choice is the best: rows without a temperature, and those whose largest logit is not finite.
  __device__ bool draws() const { return settings.temperature > 0 && isfinite(largest); }
};

// Completes a row from what its blocks have measured. One warp computes, for all.
__device__ __forceinline__ void open_row(const SampleParams& params, const Extremes* extremes, int index, Row& row,
                                         RowState& state) {
  if (threadIdx.x < 32) {
    const RowSettings settings = settings_of(params, index);
    uint64_t best = 0, negative = 0;
    for (unsigned block = threadIdx.x; block < gridDim.x; block += 32) {
      best = max(best, extremes[block].best);
      negative = max(negative, extremes[block].negative);
    }
    best = warp_max<32>(best);
    negative = warp_max<32>(negative);
    if (threadIdx.x == 0) {
      const float largest = from_ordered_bits(static_cast<uint32_t>(best >> 32));
      const float spread = largest + from_ordered_bits(static_cast<uint32_t>(negative));
      // Finite, so that -inf is never in range.
      const float range = fminf(fminf(spread, kUsefulRange * settings.temperature), 3.4028235e38f);
      state.settings = settings;
      state.best = best;
      state.largest = largest;
      state.range = range;
      state.bins_per_unit = range > 0 ? kBins / range : 0.0f;
      state.exponent = 1.44269504f / settings.temperature;
    }
  }
  __syncthreads();
  row.largest = state.largest;
  row.range = state.range;
  row.bins_per_unit = state.bins_per_unit;
  row.exponent = state.exponent;
}

struct Scanned {
  uint64_t sum, total;
};

// The sum of the values of this thread and of those before it, and that of all.
__device__ __noinline__ Scanned block_scan(uint64_t value, uint64_t* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto warp_scan = [lane](uint64_t sum) {
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += other;
    }
    return sum;
  };
  const uint64_t sum = warp_scan(value);
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  const uint64_t warps = warp_scan(lane < kGreedyWarps ? shared[lane] : 0);
  const uint64_t before = __shfl_sync(0xffffffffu, warps, max(warp - 1, 0));
  __syncthreads();
  return {(warp > 0 ? before : 0) + sum, __shfl_sync(0xffffffffu, warps, 31)};
}

}  // namespace ringkernels
