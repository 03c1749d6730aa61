#include "moe/experts_paths.cuh"

namespace ringkernels::moe {

template struct ExpertsPath<PlainWeights<__nv_bfloat16>>;

}  // namespace ringkernels::moe
