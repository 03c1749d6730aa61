#include "moe/experts_paths.cuh"

namespace ringkernels::moe {

template struct ExpertsPath<Int8Weights>;

}  // namespace ringkernels::moe
