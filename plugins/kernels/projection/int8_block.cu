#include "projection/kernel.cuh"

namespace ringkernels {

Status launch_projection_int8_block(const ProjectionParams& params, const ProjectionPlan& plan,
                                    const LaunchShape& shape) {
  return launch_projection<Int8Operand, true>(params, plan, shape);
}

}  // namespace ringkernels
