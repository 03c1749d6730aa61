#include "projection/hopper_row.cuh"

namespace ringkernels::hopper_projection {

Status launch_row_fp16(const ProjectionParams& params, const RowPlan& plan, const CUtensorMap& map,
                       const LaunchShape& shape) {
  return launch_row_format<Format::kFloat16>(params, plan, map, shape);
}

}  // namespace ringkernels::hopper_projection
