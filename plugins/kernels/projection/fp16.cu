#include "projection/kernel.cuh"

namespace ringkernels {

Status launch_projection_fp16(const ProjectionParams& params, const ProjectionPlan& plan,
                              const LaunchShape& shape) {
  return launch_projection<HalfOperand<__half>, false>(params, plan, shape);
}

}  // namespace ringkernels
