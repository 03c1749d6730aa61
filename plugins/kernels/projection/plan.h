// How a projection is spread over warps and blocks.
#pragma once

#include <cstddef>

#include "norm/row_math.cuh"
#include "ringkernels/projection.h"

namespace ringkernels {

struct DeviceLimits {
  int major;  // of the compute capability
  int multiprocessors;
  int shared_bytes;      // that a block may ask for
  int shared_bytes_all;  // of a multiprocessor
};

// `split` warps of a block share the k of one row tile; warps / split row tiles are under way in a block at
// once. k is walked in chunks whose tokens fit into shared memory; within a chunk, warp w of the split owns
// the steps [w * warp_steps, (w + 1) * warp_steps).
struct ProjectionPlan {
  int shape;  // index into kKernelShapes
  int blocks;
  int row_tiles;  // of 16 * KernelShape::row_tiles rows
  int log_split;
  int warp_steps;   // per chunk
  int chunk_steps;  // split * warp_steps
  int chunks;
  int total_steps;   // of 128 bytes of a row, the last may be half
  int total_planes;  // of 64 bytes
  int depth;         // steps that a warp has under way
  int early;         // of them, before the previous kernel's results are waited for
  int held;          // 1: the block keeps the whole input in registers between its two passes over it
  int tokens_bytes;  // parts of shared memory, in this order
  int scales_bytes;
  int stats_bytes;  // 0: no statistics are needed
  int sums_bytes;   // 0: no split
  int ring_bytes;
  RowLayout layout;
  size_t shared_bytes;
};

constexpr int kMaxDepth = 4;

// What an instantiation brings along, and the depth that suits it where shared memory allows.
struct KernelShape {
  int token_tiles;  // of 8
  int row_tiles;    // of 16, per warp
  int warps;
  int depth;        // at most kMaxDepth
  int blocks;       // per multiprocessor
  int held_octets;  // of the input, per thread
};

// Many small blocks balance best; few large ones do the work on the input less often.
constexpr KernelShape kKernelShapes[] = {
    {1, 1, 8, 4, 2, 4}, {1, 1, 16, 4, 1, 4}, {2, 1, 16, 4, 1, 4}, {4, 1, 16, 3, 1, 4}, {8, 2, 8, 2, 1, 4},
};
constexpr int kNumKernelShapes = sizeof(kKernelShapes) / sizeof(kKernelShapes[0]);

// Bytes that a step of one warp takes in the ring of weights under way.
constexpr int ring_slot_bytes(int row_tiles, bool block_scale) {
  return row_tiles * 2048 + (block_scale ? 128 : 0);
}

// Whether the input's statistics are needed before it can be staged: a norm, or a scale per token found here.
bool needs_row_stats(const ProjectionParams& params);

// The shape and split that take the least time by a simple model. False if none fits into the shared memory.
bool make_plan(const ProjectionParams& params, const DeviceLimits& limits, ProjectionPlan* plan);

}  // namespace ringkernels
