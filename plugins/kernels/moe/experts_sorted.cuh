// Experts for more tokens: pairs sorted by expert, then two products whose blocks take one expert, some rows
// and up to 8 or 16 of its tokens, so that each weight comes from memory once; then the sum over the experts
// of a token.
#pragma once

#include "moe/experts_paths.h"
#include "moe/experts_stage.cuh"

namespace ringkernels::moe {

constexpr int kSortThreads = 512;
constexpr int kMaxSortedExperts = 1024;

// Block 0 sorts, block 1 + t prepares token t if there is anything to prepare.
template <typename Format, bool kBlock>
__global__ void __launch_bounds__(kSortThreads)
    sort_pairs_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan) {
  __shared__ float scratch[kReduceScratch];
  __shared__ int counts[kMaxSortedExperts];
  __shared__ int2 warp_totals[kSortThreads / 32];
  allow_next_kernel();
  if (blockIdx.x > 0) {
    return prepare_token<Format, kBlock>(p, plan, blockIdx.x - 1, scratch,
                                         [] { wait_for_previous_kernel(); });
  }
  wait_for_previous_kernel();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int routed = p.tokens * p.top_k, choices = choices_of(p);
  for (int e = thread; e < p.num_experts; e += kSortThreads) counts[e] = 0;
  __syncthreads();
  for (int i = thread; i < routed; i += kSortThreads) {
    const int expert = p.expert_ids[i];
    if (expert >= 0 && expert < p.num_experts) atomicAdd(counts + expert, 1);
  }
  __syncthreads();
  // Exclusive sums over the experts of (pairs, groups); each thread has neighbouring experts.
  const int each = (p.num_experts + kSortThreads - 1) / kSortThreads;
  int2 sum = {0, 0};
  for (int e = thread * each; e < min(p.num_experts, (thread + 1) * each); ++e) {
    sum.x += counts[e];
    sum.y += (counts[e] + plan.tokens_per_group - 1) / plan.tokens_per_group;
  }
  int2 before = sum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int pairs = __shfl_up_sync(kFullWarp, before.x, offset),
              groups = __shfl_up_sync(kFullWarp, before.y, offset);
    if (lane >= offset) before.x += pairs, before.y += groups;
  }
  if (lane == 31) warp_totals[warp] = before;
  __syncthreads();
  before.x -= sum.x, before.y -= sum.y;
  for (int w = 0; w < warp; ++w) before.x += warp_totals[w].x, before.y += warp_totals[w].y;
  for (int e = thread * each; e < min(p.num_experts, (thread + 1) * each); ++e) {
    const int count = counts[e];
    for (int done = 0; done < count; done += plan.tokens_per_group) {
      plan.groups[before.y++] = {e, before.x + done, min(count - done, plan.tokens_per_group), 0};
    }
    counts[e] = before.x;  // from here on: where the next pair of this expert goes
    before.x += count;
  }
  __syncthreads();
  // The order within an expert is free: a column of the product does not depend on its neighbours.
  for (int i = thread; i < routed; i += kSortThreads) {
    const int expert = p.expert_ids[i];
    if (expert < 0 || expert >= p.num_experts) continue;
    plan.pairs[atomicAdd(counts + expert, 1)] = i / p.top_k * choices + i % p.top_k;
  }
  if (thread == kSortThreads - 1) {  // has the totals: they are at the end of the last expert
    int groups = before.y;
    if (has_shared(p)) {
      for (int done = 0; done < p.tokens; done += plan.tokens_per_group) {
        plan.groups[groups++] = {p.num_experts, before.x + done, min(p.tokens - done, plan.tokens_per_group),
                                 0};
      }
    }
    *plan.group_count = groups;
    warp_totals[0].x = before.x;
  }
  __syncthreads();
  if (!has_shared(p)) return;
  for (int t = thread; t < p.tokens; t += kSortThreads)
    plan.pairs[warp_totals[0].x + t] = t * choices + p.top_k;
}

// What a lane reads of one tile of 16 rows; row_bytes is 0 past the last row.
struct LaneRows {
  const uint8_t* low;
  const uint8_t* high;
  int row_bytes;
  int base;  // first row of the tile, -1: none
};

template <typename Format, bool kDown>
__device__ __forceinline__ LaneRows lane_rows(const Matrix& m, int base) {
  const int g = threadIdx.x % 32 / 4;
  LaneRows rows = {m.weights, m.weights, 0, -1};
  if (base >= m.rows) return rows;
  rows.base = base;
  rows.row_bytes = m.columns * Format::kElementBytes;
  rows.low = m.weights + (int64_t)(base + (kDown ? g : 2 * g)) * rows.row_bytes;
  rows.high = rows.low + (kDown ? 8 : 1) * (int64_t)rows.row_bytes;
  return rows;
}

// Shared memory of one stage of sorted_product_kernel: tokens, their scales, their pairs.
__host__ __device__ inline int stage_bytes_of(const ExpertsParams& p, int tiles, bool down) {
  const int columns = down ? widest(p) : p.hidden_size;
  const int scales = p.scale_kind == ScaleKind::kBlock128 ? blocks_of(columns) : 1;
  const int bytes =
      tiles * kTokenTile * (token_pitch(p.weight_dtype, columns) + (scales + 1) * (int)sizeof(float));
  return (bytes + 15) / 16 * 16;
}

// One product over all groups. Work w is group w / chunks and rows_per_work rows; a warp has 16 rows at a
// time and all of k, so that it streams its weights without a barrier. The tokens of the next work come
// meanwhile, if there is room for two stages. grid: as many blocks as fit at once.
template <typename Format, bool kBlock, int kTiles, bool kDown>
__global__ void __launch_bounds__(kThreads, 2)
    sorted_product_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan,
                          int rows_per_work, int stages) {
  extern __shared__ __align__(16) uint8_t shared[];
  constexpr int kSlots = kTiles * kTokenTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int width = widest(p), choices = choices_of(p), columns_max = kDown ? width : p.hidden_size;
  const int pitch = token_pitch(Format::kType, columns_max), scales = kBlock ? blocks_of(columns_max) : 1;
  const int stage_bytes = stage_bytes_of(p, kTiles, kDown);
  const int chunks = ((kDown ? p.hidden_size : 2 * width) + rows_per_work - 1) / rows_per_work;
  const int tiles_per_work = rows_per_work / (kWarps * kRowTile);

  if (!kDown) wait_for_previous_kernel();
  allow_next_kernel();
  const int works = __ldcg(plan.group_count) * chunks;
  auto group_of = [&](int work) {
    if (work >= works) return Group{};
    const int4 words = __ldcg(reinterpret_cast<const int4*>(plan.groups) + work / chunks);
    return Group{words.x, words.y, words.z, 0};
  };
  auto pair_of = [&](const Group& group) {
    return lane < group.count ? __ldcg(plan.pairs + group.first + lane) : 0;
  };
  auto first_tile = [&](int work) { return work % chunks * rows_per_work + warp * kRowTile; };
  // Starts the copies of a group's tokens; lane n has the n-th pair.
  auto fetch_tokens = [&](int stage, const Group& group, int pair) {
    uint8_t* tokens = shared + stage * stage_bytes;
    auto* scale = reinterpret_cast<float*>(tokens + kSlots * pitch);
    auto* slot_pair = reinterpret_cast<int*>(scale + kSlots * scales);
    const Prepared input = kDown ? Prepared{plan.intermediate_codes, plan.intermediate_scales, scales}
                                 : prepared_of<Format>(p, plan, scales);
    const int row_bytes = row_bytes_of<Format>(columns_max);
    for (int slot = warp; slot < group.count; slot += kWarps) {
      const int found = __shfl_sync(kFullWarp, pair, slot);
      const int row = kDown ? found : found / choices;
      copy_token<Format>(tokens + slot * pitch, scale + slot * scales, input.codes + (int64_t)row * row_bytes,
                         row_bytes, input.scales + (int64_t)row * input.scale_stride, scales,
                         input.scale_stride == 0);
      if (lane == 0) slot_pair[slot] = found;
    }
  };
  int work = blockIdx.x, stage = 0;
  Group group = group_of(work), next_group = group_of(work + gridDim.x);
  Matrix m = matrix_of<Format>(p, group.expert, kDown);
  LaneRows rows = {};
  StepLoads loads[2];
  if (work < works) {
    rows = lane_rows<Format, kDown>(m, first_tile(work));
    loads[0].fetch(rows.low, rows.high, 0, rows.row_bytes);
    loads[1].fetch(rows.low, rows.high, kStepSegments, rows.row_bytes);
  }
  if (kDown) wait_for_previous_kernel();
  fetch_tokens(0, group, pair_of(group));
  int next_pair = pair_of(next_group);
  for (; work < works; work += gridDim.x) {
    const int next_work = work + gridDim.x;
    wait_for_copies();
    __syncthreads();
    if (stages == 2) fetch_tokens(stage ^ 1, next_group, next_pair);
    const Group group_after = group_of(next_work + gridDim.x);
    const uint8_t* stage_start = shared + stage * stage_bytes;
    const uint8_t* tokens = stage_start + lane / 4 * pitch;
    const auto* token_scale = reinterpret_cast<const float*>(stage_start + kSlots * pitch);
    const auto* slot_pair = reinterpret_cast<const int*>(token_scale + kSlots * scales);
    const int segments = segments_of(m.columns, Format::kElementBytes);
    const int used_tiles = (group.count + kTokenTile - 1) / kTokenTile;
    auto block_scale = [&](int t, int column, int block) {
      return token_scale[(t * kTokenTile + lane % 4 * 2 + column) * scales + block];
    };
    for (int r = 0; r < tiles_per_work; ++r) {
      LaneRows next_rows = {rows.low, rows.high, 0, -1};
      if (r + 1 < tiles_per_work) {
        next_rows = lane_rows<Format, kDown>(m, first_tile(work) + (r + 1) * kWarps * kRowTile);
      } else if (next_work < works) {
        next_rows =
            lane_rows<Format, kDown>(matrix_of<Format>(p, next_group.expert, kDown), first_tile(next_work));
      }
      float low_scale = 1.0f, high_scale = 1.0f;
      if (!kBlock && rows.base >= 0) {
        low_scale = row_scale(p, m, rows.base + (kDown ? lane / 4 : lane / 4 * 2));
        high_scale = row_scale(p, m, rows.base + (kDown ? lane / 4 + 8 : lane / 4 * 2 + 1));
      }
      const BlockScales weight_scale = kBlock ? block_scales(m, max(rows.base, 0), kDown) : BlockScales{};
      Sums<Format, kBlock, kTiles> sums;
      sums.clear();
      for (int s = 0; s < segments; s += 2 * kStepSegments) {
        const bool last = s + 2 * kStepSegments >= segments;
        const LaneRows from = {last ? next_rows.low : rows.low, last ? next_rows.high : rows.high,
                               last ? next_rows.row_bytes : rows.row_bytes, 0};
        const int ahead = last ? 0 : s + 2 * kStepSegments;
        sums.step(loads[0], s, segments, tokens, kTokenTile * pitch, used_tiles, weight_scale, block_scale);
        loads[0].fetch(from.low, from.high, ahead, from.row_bytes);
        sums.step(loads[1], s + kStepSegments, segments, tokens, kTokenTile * pitch, used_tiles, weight_scale,
                  block_scale);
        loads[1].fetch(from.low, from.high, ahead + kStepSegments, from.row_bytes);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int column = 0; column < 2; ++column) {
          const int slot = t * kTokenTile + lane % 4 * 2 + column;
          if (slot >= group.count || rows.base < 0) continue;
          const float scale = is_8bit(Format::kType) && !kBlock ? token_scale[slot * scales] : 1.0f;
          const float low = sums.value(t, column) * (scale * low_scale);
          const float high = sums.value(t, 2 + column) * (scale * high_scale);
          if constexpr (kDown) {
            float* target = plan.results + (int64_t)slot_pair[slot] * p.hidden_size + rows.base + lane / 4;
            target[0] = low;
            target[8] = high;
          } else {
            plan.intermediate[(int64_t)slot_pair[slot] * width + rows.base / 2 + lane / 4] =
                swiglu(low, high);
          }
        }
      }
      rows = next_rows;
    }
    group = next_group;
    m = matrix_of<Format>(p, group.expert, kDown);
    if (stages == 2) {
      stage ^= 1;
    } else {
      __syncthreads();
      fetch_tokens(0, group, next_pair);
    }
    next_group = group_after;
    next_pair = pair_of(next_group);
  }
  wait_for_copies();
}

inline int most_stage_bytes(const ExpertsParams& p, int tiles) {
  const int first = stage_bytes_of(p, tiles, false), second = stage_bytes_of(p, tiles, true);
  return first > second ? first : second;
}

}  // namespace ringkernels::moe
