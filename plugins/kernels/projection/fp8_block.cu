#include "projection/kernel.cuh"

namespace ringkernels {

Status launch_projection_fp8_block(const ProjectionParams& params, const ProjectionPlan& plan,
                                   const LaunchShape& shape) {
  return launch_projection<Fp8Operand, true>(params, plan, shape);
}

}  // namespace ringkernels
