#include "projection/kernel.cuh"

namespace ringkernels {

Status launch_projection_bf16(const ProjectionParams& params, const ProjectionPlan& plan,
                              const LaunchShape& shape) {
  return launch_projection<HalfOperand<__nv_bfloat16>, false>(params, plan, shape);
}

}  // namespace ringkernels
