#include "projection/hopper.cuh"

namespace ringkernels::hopper_projection {

Status launch_fp8(const ProjectionParams& params, const Plan& plan, const Maps& maps, LaunchShape shape) {
  return launch_format<Format::kFp8>(params, plan, maps, shape);
}

}  // namespace ringkernels::hopper_projection
