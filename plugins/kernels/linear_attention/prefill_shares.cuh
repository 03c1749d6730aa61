// How the blocks of segment_kernel share out their work, and where scan_kernel finds what they computed.
//
// The work is a line: row after row, head after head, segment after segment (all but the last of a row, whose
// state is computed with its outputs), of each segment the chunks at its end that the decay has not
// forgotten. Every block takes an equal stretch of the line, its share, whichever heads forget slowly. A run
// is what a share has of one segment; its sum has a slot in the workspace.
#pragma once

#include "linear_attention/prefill.h"
#include "linear_attention/prefill_common.cuh"

namespace ringkernels {
namespace linear_attention {

constexpr int kRunCost = 4;      // of a run besides its chunks, in chunks
constexpr int kUncutChunks = 8;  // up to so many of a segment go to one block: another run costs more

// A head of a row, and its segments on the line.
struct HeadRow {
  float log_decay;
  uint32_t first;  // token in N of the first chunk on the line
  int chunks;      // of each segment
  uint16_t head;
  uint16_t segments;  // on the line before this pair's

  __device__ __forceinline__ uint32_t width() const { return chunks + kRunCost; }
  // Chunks before the place `offset` behind a segment's begin on the line.
  __device__ __forceinline__ int cut(int offset) const {
    const int inside = min(max(offset, 0), chunks + kRunCost);
    if (chunks <= kUncutChunks) return 2 * inside < chunks + kRunCost ? 0 : chunks;
    return max(inside - kRunCost, 0);
  }
};

// Of a warp's lanes up to this one.
__device__ __forceinline__ uint32_t inclusive_sum(uint32_t value) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint32_t below = __shfl_up_sync(0xffffffffu, value, offset);
    value += (int)threadIdx.x % 32 < offset ? 0 : below;
  }
  return value;
}

// The whole line, in shared memory. 32 bits hold a place: all tokens of a GPU's memory, and kRunCost for each
// segment.
template <int kMaxShares>
struct Line {
  static constexpr int kMaxPairs = kMaxShares / 2;
  HeadRow pairs[kMaxPairs + 1];   // of the one behind the last: `segments`, that is of all
  uint32_t start[kMaxPairs + 1];  // of each pair, and the end
  uint32_t each, longer;          // the length of a share; so many are longer by one

  // By a whole block.
  __device__ __forceinline__ void measure(const PrefillArgs& args) {
    const int count = args.params.batch * args.params.num_heads, lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
      uint32_t begin = 0, segments_before = 0;
      for (int base = 0; base < count; base += 32) {
        const bool inside = base + lane < count;
        const int index = inside ? base + lane : 0;
        const Row row = locate_row(args.params, index / args.params.num_heads);
        HeadRow pair = measure_pair(args, row, index % args.params.num_heads);
        const uint32_t own = inside && row.length > 0 ? (row.length - 1) / args.segment_tokens : 0;
        const uint32_t widths = inclusive_sum(own * pair.width()), counts = inclusive_sum(own);
        if (inside) {
          start[index] = begin + widths - own * pair.width();
          pair.segments = static_cast<uint16_t>(segments_before + counts - own);
          pairs[index] = pair;
        }
        begin += __shfl_sync(0xffffffffu, widths, 31);
        segments_before += __shfl_sync(0xffffffffu, counts, 31);
      }
      if (lane == 0) {
        start[count] = begin;
        each = begin / args.shares, longer = begin % args.shares;
        pairs[count].segments = static_cast<uint16_t>(segments_before);
      }
    }
    __syncthreads();
  }

  // Of a pair.
  __device__ __forceinline__ int segments(int index) const {
    return pairs[index + 1].segments - pairs[index].segments;
  }
  // Where a share begins.
  __device__ __forceinline__ uint32_t border(uint32_t share) const {
    return each * share + min(share, longer);
  }
  // The share that a place is in.
  __device__ __forceinline__ int share_at(uint32_t place) const {
    const uint32_t end_of_longer = border(longer);
    return place < end_of_longer ? place / (each + 1) : longer + (place - end_of_longer) / each;
  }
  // The pair where a share begins, any if the share is empty; by whole warps.
  __device__ __forceinline__ int first_pair(const PrefillArgs& args, int share) const {
    const int count = args.params.batch * args.params.num_heads, lane = threadIdx.x % 32;
    const uint32_t place = border(share);
    int before = 0;
    for (int base = 0; base < count; base += 32) {
      const bool behind = base + lane + 1 < count && start[base + lane + 1] <= place;
      before += __popc(__ballot_sync(0xffffffffu, behind));
    }
    return before;
  }

 private:
  __device__ __forceinline__ static HeadRow measure_pair(const PrefillArgs& args, const Row& row, int head) {
    const float log_decay = args.params.log_decay[head];
    const int tokens = remembered_tokens(log_decay, args.segment_tokens);
    const auto first = static_cast<uint32_t>(row.first + args.segment_tokens - tokens);
    return HeadRow{log_decay, first, tokens / kChunk, static_cast<uint16_t>(head), 0};
  }
};

struct Run {
  float log_decay;
  int head;
  int64_t first;  // token in N
  int chunks;
  int starts;  // the segment of the pair that this is the first run of, or -1
  int slot;    // no other run's, in the order of the line
};

// The runs of a share from pair `index` on, one after the other.
template <int kMaxShares>
class ShareWalk {
 public:
  __device__ __forceinline__ ShareWalk(const PrefillArgs& args, const Line<kMaxShares>& line, int share,
                                       int index)
      : line_(line),
        segment_tokens_(args.segment_tokens),
        share_(share),
        begin_(line.border(share)),
        end_(line.border(share + 1)),
        index_(index),
        segment_((max(begin_, line.start[index]) - line.start[index]) / line.pairs[index].width()) {}

  __device__ __forceinline__ bool next(Run& run) {
    if (begin_ == end_) return false;
    for (;; ++segment_) {
      while (segment_ == line_.segments(index_)) {
        if (line_.start[++index_] >= end_) return false;
        segment_ = 0;
      }
      const HeadRow& pair = line_.pairs[index_];
      const uint32_t place = line_.start[index_] + segment_ * pair.width();
      if (place >= end_) return false;
      const int from = pair.cut((int)(begin_ - place)), to = pair.cut((int)(end_ - place));
      if (from == to) continue;
      run.log_decay = pair.log_decay;
      run.head = pair.head;
      run.first = (int64_t)segment_ * segment_tokens_ + pair.first + from * kChunk;
      run.chunks = to - from;
      run.starts = from == 0 ? segment_ : -1;
      run.slot = share_ + pair.segments + segment_;
      ++segment_;
      return true;
    }
  }

 private:
  const Line<kMaxShares>& line_;
  const int segment_tokens_, share_;
  const uint32_t begin_, end_;
  int index_, segment_;
};

}  // namespace linear_attention
}  // namespace ringkernels
