// How the context of a row is split over blocks. The host chooses the number of splits from the largest
// context of the launch; each block derives its part from the row's own position, so that a captured graph
// serves every step.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ringkernels::attention {

constexpr int kWarps = 8;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kMaxSplits = 256;
constexpr int kWavesOfSplits = 4;  // bounds the workspace

struct SplitRange {
  int32_t chunk;  // tiles per split
  int32_t count;  // splits that have work
};

// Every warp of a block gets at least one tile: fewer would add blocks and combining without adding loads in
// flight.
inline
#ifdef __CUDACC__
    __host__ __device__
#endif
        SplitRange split_range(int32_t tiles, int splits) {
  const int32_t even = (tiles + splits - 1) / splits;
  const int32_t chunk = even < kWarps ? kWarps : even;
  return {chunk, (tiles + chunk - 1) / chunk};
}

inline int max_splits(int pairs, int block_slots) {
  return std::clamp(kWavesOfSplits * block_slots / std::max(pairs, 1), 1, kMaxSplits);
}

// Splits per (row, kv head) that minimise waves x (tiles of a block + its fixed cost).
// tiles: of the largest context. block_slots: blocks that run at once on the GPU.
inline int choose_splits(int32_t tiles, int pairs, int block_slots) {
  constexpr double kBlockCost = 0.6;  // rounds of kWarps tiles that a block's prologue and epilogue are worth
  constexpr double kCombineCost = 0.01;  // per split, in the block that combines
  int best = 1;
  double best_cost = 0;
  for (int splits = 1; splits <= max_splits(pairs, block_slots); ++splits) {
    const SplitRange range = split_range(tiles, splits);
    const int64_t waves = (static_cast<int64_t>(pairs) * range.count + block_slots - 1) / block_slots;
    const int32_t rounds = (range.chunk + kWarps - 1) / kWarps;
    const double cost = waves * (rounds + kBlockCost) + (range.count > 1 ? kCombineCost * range.count : 0.0);
    if (splits == 1 || cost < best_cost) {
      best = splits;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace ringkernels::attention
