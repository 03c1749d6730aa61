#include "moe/experts_paths.cuh"

namespace ringkernels::moe {

template struct ExpertsPath<Fp8Weights>;

}  // namespace ringkernels::moe
