// The product on sm_90a, for inputs that need no arithmetic: see hopper.cuh.
#pragma once

#include "ringkernels/projection.h"

namespace ringkernels {

namespace hopper_projection {

struct Plan {
  int tokens;       // columns of the product: 8, 32 or 64
  int tiles;        // of 64 rows
  int split;        // blocks of a cluster that share the k of a tile: 1, 2 or 4
  int total_steps;  // of 128 bytes of a row
  int block_steps;  // of them, that a block has at most
};

}  // namespace hopper_projection

// False on another GPU, or if parameters need the general way.
bool hopper_projection_serves(const ProjectionParams& params, int major, int multiprocessors);
Status launch_hopper_projection(const ProjectionParams& params, int multiprocessors, Stream stream);

}  // namespace ringkernels
