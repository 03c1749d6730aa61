// The product of one row on sm_90a, its input normed and quantized on the way: see hopper_row.cuh.
#pragma once

#include "norm/row_math.cuh"
#include "ringkernels/projection.h"

namespace ringkernels {

namespace hopper_projection {

struct RowPlan {
  int rows;    // of a tile, a multiple of 8 up to 64
  int tiles;
  int blocks;  // each has every blocks-th tile
  int steps;   // of 128 bytes of a row
  int stages;  // of a tile's rows times 128 bytes that are under way at once
  RowLayout layout;
  size_t shared_bytes;
};

}  // namespace hopper_projection

// False on another GPU, or if parameters need the general way.
bool hopper_row_serves(const ProjectionParams& params, int major, int multiprocessors);
Status launch_hopper_row(const ProjectionParams& params, int multiprocessors, Stream stream);

}  // namespace ringkernels
