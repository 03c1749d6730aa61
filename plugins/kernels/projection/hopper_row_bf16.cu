#include "projection/hopper_row.cuh"

namespace ringkernels::hopper_projection {

Status launch_row_bf16(const ProjectionParams& params, const RowPlan& plan, const CUtensorMap& map,
                       const LaunchShape& shape) {
  return launch_row_format<Format::kBFloat16>(params, plan, map, shape);
}

}  // namespace ringkernels::hopper_projection
