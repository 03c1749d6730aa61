#include "projection/kernel.cuh"

namespace ringkernels {

Status launch_projection_fp8(const ProjectionParams& params, const ProjectionPlan& plan,
                             const LaunchShape& shape) {
  return launch_projection<Fp8Operand, false>(params, plan, shape);
}

}  // namespace ringkernels
