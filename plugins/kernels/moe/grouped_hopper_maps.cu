// Tensor maps of the grouped products, through the driver's entry point: nothing is linked against libcuda.
#include "moe/grouped_hopper.cuh"

namespace ringkernels::grouped {
namespace {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encode find_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found)
                                                                       : nullptr;
}

struct Layout {
  unsigned rank;
  cuuint64_t sizes[5];
  cuuint64_t strides[4];  // bytes, of dimensions 1 and up
  cuuint32_t box[5];
};

Status encode(Encode encoder, CUtensorMap* map, const void* address, const Layout& layout, bool bytes) {
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encoder(map, bytes ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, layout.rank,
              const_cast<void*>(address), layout.sizes, layout.strides, layout.box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, bytes ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status{};
  return Status{StatusCode::kLaunchFailed, "cuTensorMapEncodeTiled", "success", (int64_t)result};
}

// Rows in the order that the kernel's threads want: see grouped_hopper.cuh.
Layout weight_layout(const Side& side, int64_t groups, bool swiglu) {
  const cuuint64_t row = side.sum_bytes, sixteenths = groups * side.weight_rows / 16;
  if (swiglu) {  // 8 gates, then their 8 ups
    return {5, {row, 8, 2, sixteenths, 1}, {2 * row, row, 16 * row, 16 * row}, {kSumBytes, 8, 2, 8, 1}};
  }
  return {5, {row, 2, 4, 2, sixteenths}, {row, 4 * row, 2 * row, 16 * row}, {kSumBytes, 2, 4, 2, 8}};
}

}  // namespace

Status encode_maps(const Product& product, bool swiglu, bool block_scale, int64_t max_rows,
                   HopperMaps* maps) {
  const Encode encoder = find_encoder();
  if (encoder == nullptr) {
    return Status{StatusCode::kUnsupported, "cuTensorMapEncodeTiled", "a driver of CUDA 12 or newer", 0};
  }
  for (int index = 0; index < product.num_groups - product.num_experts + 1; ++index) {
    const Side& side = product.sides[index];
    const cuuint64_t row = side.sum_bytes, rows = index == 0 ? max_rows : product.num_tokens;
    Status status = encode(encoder, &maps->weights[index], side.weights,
                           weight_layout(side, index == 0 ? product.num_experts : 1, swiglu), true);
    if (!status.ok()) return status;
    const Layout tokens = {2, {row, rows}, {row}, {kSumBytes, kTokenStep}};
    status = encode(encoder, &maps->tokens[index], side.tokens, tokens, true);
    if (!status.ok()) return status;
    if (!block_scale) continue;
    const cuuint64_t stride = side.scale_stride, blocks = ceil_div(side.sum_bytes, kSumBytes);
    const Layout scales = {2, {stride, blocks}, {stride * sizeof(float)}, {kTokenTile, 1}};
    status = encode(encoder, &maps->scales[index], side.token_scale, scales, false);
    if (!status.ok()) return status;
  }
  return Status{};
}

}  // namespace ringkernels::grouped
