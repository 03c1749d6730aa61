// What all ways to compute a projection do with a result.
#pragma once

#include "common/vec.cuh"
#include "ringkernels/projection.h"

namespace ringkernels {

// What the result is added to.
__device__ __forceinline__ float output_before(const ProjectionParams& p, int token, int row) {
  if (!p.accumulate) return 0.0f;
  const int64_t index = token * p.output_row_stride + row;
  if (p.output_dtype == DType::kFloat32) return static_cast<const float*>(p.output)[index];
  if (p.output_dtype == DType::kFloat16) return __half2float(static_cast<const __half*>(p.output)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p.output)[index]);
}

__device__ __forceinline__ void put_output(const ProjectionParams& p, int token, int row, float y) {
  const int64_t index = token * p.output_row_stride + row;
  if (p.output_dtype == DType::kFloat32)
    static_cast<float*>(p.output)[index] = y;
  else if (p.output_dtype == DType::kFloat16)
    static_cast<__half*>(p.output)[index] = __float2half_rn(y);
  else
    static_cast<__nv_bfloat16*>(p.output)[index] = __float2bfloat16_rn(y);
}

__device__ __forceinline__ void store_output(const ProjectionParams& p, int token, int row, float y) {
  put_output(p, token, row, output_before(p, token, row) + y);
}

}  // namespace ringkernels
