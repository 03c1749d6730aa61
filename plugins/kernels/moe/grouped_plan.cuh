// What the kernels of the grouped experts share: who computes which tile, and what a product reads and
// writes.
//
// Group e < num_experts are the rows routed to expert e, sorted; the shared expert is one more group of all
// tokens. Both operands are read as rows of bytes: weights [groups * weight_rows, sum_bytes], tokens [rows,
// sum_bytes]. A tile is 128 weight rows (the tensor cores' 64-row operand, twice) by up to 192 tokens (their
// columns, in steps of 32), so that an expert with 140 tokens costs 160 and reads its weights once.
#pragma once

#include "common/launch.cuh"
#include "common/vec.cuh"
#include "ringkernels/moe.h"

namespace ringkernels::grouped {

constexpr int kWeightTile = 128;
constexpr int kTokenTile = 192;
constexpr int kTokenStep = 32;
constexpr int kBand =
    8;  // token tiles that share a sweep over the weights, so that both stay in the L2 cache
constexpr int kSumBytes = 128;  // bytes of a row per pipeline stage
constexpr int kScaleBlock = 128;
constexpr int kRowAlignment = 4;  // the copy engine reads scales from multiples of 16 bytes

// One of the two products, for the routed experts or for the shared one.
struct Side {
  const uint8_t* weights;     // [groups, weight_rows, sum_bytes]
  const uint8_t* tokens;      // [rows, sum_bytes]
  const float* weight_scale;  // kChannel [groups, weight_rows], kTensor [groups], kBlock128 see moe.h
  const float* token_scale;   // [rows], [sum blocks, scale_stride] for kBlock128, or null: not quantized
  void* output;               // [rows, weight_rows], or [rows, weight_rows / 2] after SwiGLU, 16-bit
  int32_t weight_rows;
  int32_t sum_bytes;
  int32_t scale_stride;
};

struct Product {
  Side sides[2];          // routed, shared
  const int32_t* rows;    // [experts + 1] first row of each expert, a multiple of kRowAlignment
  const int32_t* counts;  // [experts] rows of each expert
  const int32_t* tiles;   // [groups + 1] first tile of each group
  int32_t num_experts;
  int32_t num_groups;
  int32_t num_tokens;
  ScaleKind scale_kind;
  bool half;  // the 16-bit output is fp16, not bf16
};

struct TileIndex {
  int group;
  int side;
  int weight_tile;
  int row;      // first row of the tile in its side
  int columns;  // its tokens
};

// tiles, rows: of Product, wherever the caller holds them. index < tiles[num_groups].
__device__ __forceinline__ TileIndex find_tile(const Product& product, const int32_t* tiles, int index) {
  int low = 0, high = product.num_groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tiles[middle] <= index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  TileIndex tile;
  tile.group = low;
  tile.side = low == product.num_experts;
  const int first = tile.side ? 0 : product.rows[low];
  const int count = tile.side ? product.num_tokens : product.counts[low];
  const int weight_tiles = ceil_div(product.sides[tile.side].weight_rows, kWeightTile);
  const int token_tiles = ceil_div(count, kTokenTile);
  const int within = index - tiles[low];
  const int band = within / (kBand * weight_tiles), rest = within % (kBand * weight_tiles);
  const int width = min(kBand, token_tiles - band * kBand);
  tile.weight_tile = rest / width;
  const int token_tile = band * kBand + rest % width;
  const int even = ceil_div(ceil_div(count, token_tiles), kTokenStep) * kTokenStep;  // 256 tokens: 2 x 128
  tile.row = first + token_tile * even;
  tile.columns = min(even, count - token_tile * even);
  return tile;
}

template <Format kFormat, bool kBlockScale>
Status launch_hopper(const Product& product, bool swiglu, int64_t max_rows, int multiprocessors,
                     bool programmatic, Stream stream);

template <Format kFormat, bool kBlockScale>
Status launch_portable(const Product& product, bool swiglu, int multiprocessors, bool programmatic,
                       Stream stream);

}  // namespace ringkernels::grouped
