// What all ways to compute a projection do with a result.
#pragma once

#include "common/vec.cuh"
#include "ringkernels/projection.h"

namespace ringkernels {

__device__ __forceinline__ void store_output(const ProjectionParams& p, int token, int row, float y) {
  const int64_t index = token * p.output_row_stride + row;
  if (p.output_dtype == DType::kFloat32) {
    auto* address = static_cast<float*>(p.output) + index;
    *address = p.accumulate ? *address + y : y;
  } else if (p.output_dtype == DType::kFloat16) {
    auto* address = static_cast<__half*>(p.output) + index;
    *address = __float2half_rn(p.accumulate ? __half2float(*address) + y : y);
  } else {
    auto* address = static_cast<__nv_bfloat16*>(p.output) + index;
    *address = __float2bfloat16_rn(p.accumulate ? __bfloat162float(*address) + y : y);
  }
}

}  // namespace ringkernels
