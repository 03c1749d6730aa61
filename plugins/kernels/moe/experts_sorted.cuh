// Experts for more tokens: pairs sorted by expert into groups of up to 8 or 16 tokens, then two products that
// stream the weights of every group once, an equal share for each multiprocessor; then the sum over the
// experts of a token.
#pragma once

#include "moe/experts_paths.h"
#include "moe/experts_stage.cuh"

namespace ringkernels::moe {

constexpr int kSortThreads = 512;
constexpr int kHeldIds = 4;  // ids that a thread of the sort reads once: all of 256 tokens with 8 choices
constexpr int kMaxSortedExperts = 1024;
// One block fills a multiprocessor: its warps share the tokens. Of 8, 10, 12 and 16 warps with rings of 2 to
// 4 steps the most warps are the fastest on the H200: what limits is how soon a step is multiplied, not what
// is under way.
constexpr int kMaxProductWarps = 16;
constexpr int kMinProductWarps = 2;
constexpr int kGateUpRingSteps = 2;
constexpr int kDownRingSteps = 3;  // its tokens take less room
constexpr int kLeastRingSteps = 2;
constexpr int kStepRowBytes = kStepSegments * kSegmentBytes;
constexpr int kLeastRingBytes = kMinProductWarps * kLeastRingSteps * kStepBytes;
constexpr int kMaxBuffers = 4;  // groups whose tokens are in shared memory at once: a share is of three or so

// Block 0 sorts, block 1 + t prepares token t if there is anything to prepare.
template <typename Format, bool kBlock>
__global__ void __launch_bounds__(kSortThreads)
    sort_pairs_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan) {
  __shared__ float scratch[kReduceScratch];
  __shared__ int counts[kMaxSortedExperts];
  __shared__ int2 warp_totals[kSortThreads / 32];
  const auto begin = [] {
    wait_for_previous_kernel();
    allow_next_kernel();
  };
  if (blockIdx.x > 0) return prepare_token<Format, kBlock>(p, plan, blockIdx.x - 1, scratch, begin);
  begin();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int routed = p.tokens * p.top_k, choices = choices_of(p);
  int held[kHeldIds];
#pragma unroll
  for (int i = 0; i < kHeldIds; ++i) {
    const int index = thread + i * kSortThreads;
    held[i] = index < routed ? p.expert_ids[index] : -1;
  }
  auto for_each_pair = [&](auto use) {
#pragma unroll
    for (int i = 0; i < kHeldIds; ++i) {
      if (held[i] >= 0 && held[i] < p.num_experts) use(thread + i * kSortThreads, held[i]);
    }
    for (int i = thread + kHeldIds * kSortThreads; i < routed; i += kSortThreads) {
      const int expert = p.expert_ids[i];
      if (expert >= 0 && expert < p.num_experts) use(i, expert);
    }
  };
  for (int e = thread; e < p.num_experts; e += kSortThreads) counts[e] = 0;
  __syncthreads();
  for_each_pair([&](int, int expert) { atomicAdd(counts + expert, 1); });
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
  for_each_pair([&](int i, int expert) {
    plan.pairs[atomicAdd(counts + expert, 1)] = i / p.top_k * choices + i % p.top_k;
  });
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

// A step of a warp in shared memory: 256 bytes of 16 rows, which 16 lanes copy as whole lines of memory. Two
// rows that one read of a quarter warp meets lie in different banks.
template <bool kDown>
struct RingStep {
  const uint8_t* start;

  __device__ __forceinline__ static int place(int row, int byte) {
    return row * kStepRowBytes + (byte ^ ((kDown ? row : row / 2) % 2 * kSegmentBytes));
  }
  __device__ __forceinline__ static void copy(uint8_t* step, const uint8_t* rows, int row_bytes, int offset) {
    const int lane = threadIdx.x % 32, byte = lane % 16 * kLaneBytes;
    const bool inside = offset + byte < row_bytes;
    const uint8_t* source = rows + (inside ? (int64_t)(lane / 16) * row_bytes + offset + byte : 0);
#pragma unroll
    for (int i = 0; i < kRowTile / 2; ++i) {
      copy_weights16(step + place(2 * i + lane / 16, byte), source, inside);
      source += inside ? 2 * (int64_t)row_bytes : 0;
    }
  }
  __device__ __forceinline__ uint4 read(int row, int u) const {
    return *reinterpret_cast<const uint4*>(start +
                                           place(row, u * kSegmentBytes + threadIdx.x % 4 * kLaneBytes));
  }
  // Row g and its partner: of the second product 8 further down, of the first its neighbour.
  __device__ __forceinline__ uint4 low(int u) const {
    return read(threadIdx.x % 32 / 4 * (kDown ? 1 : 2), u);
  }
  __device__ __forceinline__ uint4 high(int u) const {
    return read(kDown ? threadIdx.x % 32 / 4 + 8 : threadIdx.x % 32 / 4 * 2 + 1, u);
  }
};

// Shared memory for the tokens of one group: rows, their scales, their pairs.
__host__ __device__ inline int stage_bytes_of(const ExpertsParams& p, int tiles, bool down) {
  const int columns = down ? widest(p) : p.hidden_size;
  const int scales = p.scale_kind == ScaleKind::kBlock128 ? blocks_of(columns) : 1;
  const int bytes =
      tiles * kTokenTile * (token_pitch(p.weight_dtype, columns) + (scales + 1) * (int)sizeof(float));
  return (bytes + 15) / 16 * 16;
}

// Where the tokens of a group lie in shared memory, `slots` of them.
struct StagedTokens {
  uint8_t* rows;
  float* scale;
  int* pair;
  int pitch;
  int scales;  // per token

  __device__ __forceinline__ StagedTokens(uint8_t* start, int slots, int pitch_bytes, int scales_each)
      : rows(start),
        scale(reinterpret_cast<float*>(start + slots * pitch_bytes)),
        pair(reinterpret_cast<int*>(scale + slots * scales_each)),
        pitch(pitch_bytes),
        scales(scales_each) {}
};

__device__ __forceinline__ Group load_group(const ExpertsPlan& plan, int index) {
  const int4 words = __ldcg(reinterpret_cast<const int4*>(plan.groups) + index);
  return Group{words.x, words.y, words.z, 0};
}

// The pair that this lane looks up for its warp among the slots of groups [first, first + count), or -1: lane
// i has that of slot warp + i * warps.
template <int kSlots>
__device__ __forceinline__ int look_up_pair(const ExpertsPlan& plan, int first, int count) {
  const int index = (int)threadIdx.x / 32 + (int)threadIdx.x % 32 * ((int)blockDim.x / 32);
  if (index >= count * kSlots) return -1;
  const Group group = load_group(plan, first + index / kSlots);
  return index % kSlots < group.count ? __ldcg(plan.pairs + group.first + index % kSlots) : -1;
}

// Brings the tokens of `count` groups into shared memory: copies of what was prepared, or for the second
// product SwiGLU outputs, quantized on the way. A warp per token; found: of look_up_pair.
template <typename Format, bool kBlock, bool kDown, int kSlots, typename Place>
__device__ __forceinline__ void stage_groups(const ExpertsParams& p, const ExpertsPlan& plan, int found,
                                             int count, Place place) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int choices = choices_of(p), width = widest(p);
  for (int i = 0; warp + i * warps < count * kSlots; ++i) {
    const int pair = __shfl_sync(kFullWarp, found, i);
    if (pair < 0) continue;
    const int index = warp + i * warps, slot = index % kSlots;
    const StagedTokens tokens = place(index / kSlots);
    uint8_t* target = tokens.rows + slot * tokens.pitch;
    float* scale = tokens.scale + slot * tokens.scales;
    if constexpr (kDown) {
      const int columns = pair % choices == p.top_k ? p.shared_intermediate_size : p.intermediate_size;
      stage_intermediate<Format, kBlock>(plan.intermediate + (int64_t)pair * width, columns, 0, INT_MAX,
                                         p.down_input_scale,
                                         reinterpret_cast<typename Format::Activation*>(target), scale);
    } else {
      const Prepared input = prepared_of<Format>(p, plan, tokens.scales);
      const int row = pair / choices, row_bytes = row_bytes_of<Format>(p.hidden_size);
      copy_token<Format>(target, scale, input.codes + (int64_t)row * row_bytes, row_bytes,
                         input.scales + (int64_t)row * input.scale_stride, tokens.scales,
                         input.scale_stride == 0);
    }
    if (lane == 0) tokens.pair[slot] = pair;
  }
}

// One 16-row tile of a group: what a warp multiplies, and where the results go.
template <typename Format, bool kBlock, int kTiles, bool kDown>
struct TileWork {
  Group group;
  Matrix m;
  int base;  // first row
  StagedTokens tokens;
  float low_scale;  // of this lane's two rows
  float high_scale;

  __device__ __forceinline__ TileWork(const ExpertsParams& p, const Group& of, int first_row,
                                      const StagedTokens& staged)
      : group(of), m(matrix_of<Format>(p, of.expert, kDown)), base(first_row), tokens(staged) {
    const int g = threadIdx.x % 32 / 4;
    low_scale = high_scale = 1.0f;
    if constexpr (!kBlock) {
      low_scale = row_scale(p, m, base + (kDown ? g : 2 * g));
      high_scale = row_scale(p, m, base + (kDown ? g + 8 : 2 * g + 1));
    }
  }

  // value(t, i): sum i of the lane in token tile t.
  template <typename Value>
  __device__ __forceinline__ void store(const ExpertsParams& p, const ExpertsPlan& plan, Value value) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int slot = t * kTokenTile + lane % 4 * 2 + column;
        if (slot >= group.count) continue;
        const float scale = is_8bit(Format::kType) && !kBlock ? tokens.scale[slot * tokens.scales] : 1.0f;
        const float low = value(t, column) * (scale * low_scale);
        const float high = value(t, 2 + column) * (scale * high_scale);
        const int64_t pair = tokens.pair[slot];
        if constexpr (kDown) {
          float* target = plan.results + pair * p.hidden_size + base + lane / 4;
          target[0] = low;
          target[8] = high;
        } else {
          plan.intermediate[pair * widest(p) + base / 2 + lane / 4] = swiglu(low, high);
        }
      }
    }
  }
};

constexpr int kNoTile = INT_MAX;

// The tiles of a warp: of the block's stretch [begin, end) in turn with the other warps, but for those past
// the rows of their expert. The group of the next one is on its way from memory.
template <bool kDown>
class TileWalk {
 public:
  __device__ __forceinline__ TileWalk(const ExpertsParams& p, const ExpertsPlan& plan, int tiles, int begin,
                                      int end)
      : tiles_(tiles), end_(end), next_tile_(after(begin - (int)blockDim.x / 32 + (int)threadIdx.x / 32)) {
    next_ = next_tile_ != kNoTile ? load_group(plan, next_tile_ / tiles_) : Group{};
    advance(p, plan);
  }
  __device__ __forceinline__ void advance(const ExpertsParams& p, const ExpertsPlan& plan) {
    do {
      tile_ = next_tile_;
      group_ = next_;
      if (tile_ == kNoTile) return;
      next_tile_ = after(tile_);
      if (next_tile_ != kNoTile) next_ = load_group(plan, next_tile_ / tiles_);
      index_ = tile_ / tiles_;
      base_ = tile_ % tiles_ * kRowTile;
    } while (!kDown && base_ >= rows(p));
  }
  __device__ __forceinline__ bool done() const { return tile_ == kNoTile; }
  __device__ __forceinline__ int tile() const { return tile_; }
  __device__ __forceinline__ int index() const { return index_; }  // of the group
  __device__ __forceinline__ int base() const { return base_; }    // first row
  __device__ __forceinline__ const Group& group() const { return group_; }

 private:
  int tiles_, end_, tile_, next_tile_, index_, base_;
  Group group_, next_;

  __device__ __forceinline__ int after(int tile) const {
    return tile + (int)blockDim.x / 32 < end_ ? tile + (int)blockDim.x / 32 : kNoTile;
  }
  __device__ __forceinline__ int rows(const ExpertsParams& p) const {
    return 2 * (group_.expert == p.num_experts ? p.shared_intermediate_size : p.intermediate_size);
  }
};

// Until all but the last `later` (up to 2) steps are there.
__device__ __forceinline__ void wait_for_step(int later) {
  if (later == 0) asm volatile("cp.async.wait_group 0;" ::: "memory");
  if (later == 1) asm volatile("cp.async.wait_group 1;" ::: "memory");
  if (later == 2) asm volatile("cp.async.wait_group 2;" ::: "memory");
}

// The rings of a block: `steps` of each warp, of which one is multiplied while the others are under way.
struct Ring {
  int steps;
  int buffers;  // groups whose tokens fit shared memory
};

// One product over all groups. The 16-row tiles of all groups, one after the other, are shared out evenly: a
// block has a stretch of them, about three groups, whose tokens it stages first. Its warps stream the weights
// of their tiles through rings of their own, without a barrier and across the ends of tiles. grid: a block
// per multiprocessor.
template <typename Format, bool kBlock, int kTiles, bool kDown>
__global__ void __launch_bounds__(kMaxProductWarps * 32, 1)
    sorted_product_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan,
                          const Ring ring) {
  extern __shared__ __align__(16) uint8_t shared[];
  constexpr int kSlots = kTiles * kTokenTile;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int width = widest(p), columns_max = kDown ? width : p.hidden_size;
  const int pitch = token_pitch(Format::kType, columns_max), scales = kBlock ? blocks_of(columns_max) : 1;
  const int stage_bytes = stage_bytes_of(p, kTiles, kDown);
  const int tiles = (kDown ? p.hidden_size : 2 * width) / kRowTile;  // of a group; an expert may have fewer
  uint8_t* mine = shared + warp * ring.steps * kStepBytes;
  uint8_t* staged = shared + blockDim.x / 32 * ring.steps * kStepBytes;
  auto place = [&](int buffer) { return StagedTokens(staged + buffer * stage_bytes, kSlots, pitch, scales); };

  if (!kDown) wait_for_previous_kernel();
  allow_next_kernel();
  const int total = __ldcg(plan.group_count) * tiles;
  const int begin = (int)((int64_t)total * blockIdx.x / gridDim.x);
  const int end = (int)((int64_t)total * (blockIdx.x + 1) / gridDim.x);
  TileWalk<kDown> fetched(p, plan, tiles, begin, end), used = fetched;
  int fetch_slot = 0, fetch_offset = 0;
  auto fetch_step = [&] {
    if (!fetched.done()) {
      const Matrix m = matrix_of<Format>(p, fetched.group().expert, kDown);
      const int row_bytes = m.columns * Format::kElementBytes;
      RingStep<kDown>::copy(mine + fetch_slot * kStepBytes, m.weights + (int64_t)fetched.base() * row_bytes,
                            row_bytes, fetch_offset);
      fetch_offset += kStepRowBytes;
      if (fetch_offset >= row_bytes) {
        fetched.advance(p, plan);
        fetch_offset = 0;
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    fetch_slot = fetch_slot + 1 == ring.steps ? 0 : fetch_slot + 1;
  };
  for (int i = 0; i < ring.steps - 1; ++i) fetch_step();
  int slot = 0, first = begin / tiles;
  auto groups_from = [&](int group) { return min(ring.buffers, (end - 1) / tiles + 1 - group); };
  int found = begin < end ? look_up_pair<kSlots>(plan, first, groups_from(first)) : -1;
  if (kDown) wait_for_previous_kernel();
  for (int next = first; next * tiles < end; next += ring.buffers) {
    if (next > first) {
      __syncthreads();  // the tokens before have been used
      first = next;
      found = look_up_pair<kSlots>(plan, first, groups_from(first));
    }
    stage_groups<Format, kBlock, kDown, kSlots>(p, plan, found, groups_from(first), place);
    wait_for_copies();
    __syncthreads();
    while (used.tile() < min(end, (first + ring.buffers) * tiles)) {
      const TileWork<Format, kBlock, kTiles, kDown> work(p, used.group(), used.base(),
                                                         place(used.index() - first));
      const int segments = segments_of(work.m.columns, Format::kElementBytes);
      const int used_tiles = (work.group.count + kTokenTile - 1) / kTokenTile;
      auto block_scale = [&](int t, int column, int block) {
        return work.tokens.scale[(t * kTokenTile + lane % 4 * 2 + column) * scales + block];
      };
      const BlockScales weight_scale = kBlock ? block_scales(work.m, work.base, kDown) : BlockScales{};
      Sums<Format, kBlock, kTiles> sums;
      sums.clear();
      for (int s = 0; s < segments; s += kStepSegments) {
        wait_for_step(ring.steps - 2);
        __syncwarp();  // all lanes' copies are there, and all have read the slot that is filled next
        fetch_step();
        sums.step(RingStep<kDown>{mine + slot * kStepBytes}, s, segments, work.tokens.rows + lane / 4 * pitch,
                  kTokenTile * pitch, used_tiles, weight_scale, block_scale);
        slot = slot + 1 == ring.steps ? 0 : slot + 1;
      }
      work.store(p, plan, [&](int t, int i) { return sums.value(t, i); });
      used.advance(p, plan);
    }
  }
  wait_for_copies();
}

inline int most_stage_bytes(const ExpertsParams& p, int tiles) {
  const int first = stage_bytes_of(p, tiles, false), second = stage_bytes_of(p, tiles, true);
  return first > second ? first : second;
}

}  // namespace ringkernels::moe
