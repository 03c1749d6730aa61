// Maps of matrices for the bulk tensor copies of sm_90a. They are encoded for each launch through the
// driver's entry point: that takes a microsecond on the host, and nothing is linked against libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "ringkernels/types.h"

namespace ringkernels::hopper_projection {

constexpr int kSumBytes = 128;  // of a row, that a copy brings

// Rows of bytes in boxes of box_rows times kSumBytes; what lies outside of the matrix is zero.
inline Status encode_map(CUtensorMap* map, const void* address, int64_t rows, int64_t row_bytes,
                         int64_t stride, int box_rows) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult query;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &query);
  if (error != cudaSuccess || query != cudaDriverEntryPointSuccess)
    return Status{StatusCode::kUnsupported, "cuTensorMapEncodeTiled", "a driver of CUDA 12 or newer", 0};
  const cuuint64_t sizes[2] = {(cuuint64_t)row_bytes, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)stride};
  const cuuint32_t box[2] = {kSumBytes, (cuuint32_t)box_rows}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(found)(
      map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void*>(address), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status{};
  return Status{StatusCode::kLaunchFailed, "cuTensorMapEncodeTiled", "success", (int64_t)result};
}

}  // namespace ringkernels::hopper_projection
