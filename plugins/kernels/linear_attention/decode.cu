// Checks and dispatch of the linear-attention decode step.
#include "linear_attention/decode.cuh"

#include "common/check.h"

namespace ringkernels {
namespace {

constexpr int kMaxGridRows = 65535;

template <typename T, int kDim, int kColumns>
Status launch_columns(const LinearAttentionDecodeParams& params, Stream stream) {
  LaunchShape shape;
  shape.grid = dim3(kDim / kColumns, params.num_heads, params.batch);
  shape.block = dim3(linear_attention::kDecodeThreads);
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  return launch_kernel(linear_attention::decode_kernel<T, kDim, kColumns>, shape, params);
}

template <typename T, int kDim>
Status launch_dim(const LinearAttentionDecodeParams& params, Stream stream) {
  // Few heads: narrow slices, so that one row spreads over the whole GPU. Many: longer runs in memory.
  const int64_t states = (int64_t)params.batch * params.num_heads;
  if (states <= 128) return launch_columns<T, kDim, 16>(params, stream);
  return launch_columns<T, kDim, 64>(params, stream);
}

template <typename T>
Status launch_type(const LinearAttentionDecodeParams& params, Stream stream) {
  return params.head_dim == 64 ? launch_dim<T, 64>(params, stream) : launch_dim<T, 128>(params, stream);
}

}  // namespace

Status validate(const LinearAttentionDecodeParams& params) {
  RING_REQUIRE(
      params.dtype == DType::kBFloat16 || params.dtype == DType::kFloat16 || params.dtype == DType::kFloat32,
      kBadType, "dtype", "bf16, fp16 or fp32", params.dtype);
  RING_REQUIRE(params.head_dim == 64 || params.head_dim == 128, kBadShape, "head_dim", "64 or 128",
               params.head_dim);
  RING_REQUIRE(params.batch >= 0 && params.batch <= kMaxGridRows, kBadShape, "batch", "0 to 65535",
               params.batch);
  RING_REQUIRE(params.num_heads > 0 && params.num_heads <= kMaxGridRows, kBadShape, "num_heads", "1 to 65535",
               params.num_heads);
  const int64_t width = (int64_t)params.num_heads * params.head_dim;
  const int64_t per_access = 16 / (int64_t)size_of(params.dtype);
  RING_REQUIRE(params.row_stride >= width, kBadShape, "row_stride", "at least num_heads * head_dim",
               params.row_stride);
  RING_REQUIRE(params.output_row_stride >= width, kBadShape, "output_row_stride",
               "at least num_heads * head_dim", params.output_row_stride);
  RING_REQUIRE(params.row_stride % per_access == 0, kMisaligned, "row_stride", "rows of whole 16 bytes",
               params.row_stride);
  if (params.batch == 0) return Status{};
  RING_REQUIRE_POINTER(params, query);
  RING_REQUIRE_POINTER(params, key);
  RING_REQUIRE_POINTER(params, value);
  RING_REQUIRE_POINTER(params, log_decay);
  RING_REQUIRE_POINTER(params, state);
  RING_REQUIRE_POINTER(params, output);
  RING_REQUIRE_ALIGNED(params, query);
  RING_REQUIRE_ALIGNED(params, key);
  RING_REQUIRE_ALIGNED(params, value);
  RING_REQUIRE_ALIGNED(params, state);
  RING_REQUIRE_ALIGNED(params, output);
  if (params.rotary_cos == nullptr && params.rotary_sin == nullptr) return Status{};
  RING_REQUIRE_POINTER(params, rotary_cos);
  RING_REQUIRE_POINTER(params, rotary_sin);
  RING_REQUIRE_POINTER(params, position);
  RING_REQUIRE(params.rotary_dim > 0 && params.rotary_dim % 2 == 0 && params.rotary_dim <= params.head_dim,
               kBadShape, "rotary_dim", "even, 2 to head_dim", params.rotary_dim);
  return Status{};
}

size_t workspace_bytes(const LinearAttentionDecodeParams&) { return 0; }

Status launch(const LinearAttentionDecodeParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  if (params.batch == 0) return Status{};
  switch (params.dtype) {
    case DType::kBFloat16: return launch_type<__nv_bfloat16>(params, stream);
    case DType::kFloat16: return launch_type<__half>(params, stream);
    default: return launch_type<float>(params, stream);
  }
}

}  // namespace ringkernels
