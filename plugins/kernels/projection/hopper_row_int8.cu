#include "projection/hopper_row.cuh"

namespace ringkernels::hopper_projection {

Status launch_row_int8(const ProjectionParams& params, const RowPlan& plan, const CUtensorMap& map,
                       const LaunchShape& shape) {
  return launch_row_format<Format::kInt8>(params, plan, map, shape);
}

}  // namespace ringkernels::hopper_projection
