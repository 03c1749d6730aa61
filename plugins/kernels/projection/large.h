// Projections of more rows than the other kernels of this folder take: the grouped product of the experts,
// with one group. validate(), workspace_bytes() and launch() of ProjectionParams come here above kMaxSmallRows.
#pragma once

#include "ringkernels/projection.h"

namespace ringkernels {

constexpr int kMaxSmallRows = 64;

// What this path needs beyond what every projection does.
Status validate_large_projection(const ProjectionParams& params);
size_t large_projection_workspace_bytes(const ProjectionParams& params);
Status launch_large_projection(const ProjectionParams& params, Stream stream);

}  // namespace ringkernels
