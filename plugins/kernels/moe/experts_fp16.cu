#include "moe/experts_paths.cuh"

namespace ringkernels::moe {

template struct ExpertsPath<PlainWeights<__half>>;

}  // namespace ringkernels::moe
