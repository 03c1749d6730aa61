#include "projection/hopper.cuh"

namespace ringkernels::hopper_projection {

Status launch_fp16(const ProjectionParams& params, const Plan& plan, const Maps& maps, LaunchShape shape) {
  return launch_format<Format::kFloat16>(params, plan, maps, shape);
}

}  // namespace ringkernels::hopper_projection
