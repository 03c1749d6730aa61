// Rows of the embedding table, widened to fp32: the start of a step, chained to the choice of its tokens.
#include "ringkernels/embed.h"

#include "common/check.h"
#include "common/launch.cuh"
#include "common/vec.cuh"

namespace ringkernels {
namespace {

constexpr int kEmbedThreads = 128;

// grid: (octets of a row / threads, rows of a launch); each thread has one octet of every gridDim.y-th row.
template <typename T>
__global__ void __launch_bounds__(kEmbedThreads) embed_kernel(const __grid_constant__ EmbedParams p) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int column = (int)(blockIdx.x * kEmbedThreads + threadIdx.x) * kOctet;
  if (column >= p.columns) return;
  for (int row = blockIdx.y; row < p.rows; row += gridDim.y) {
    const int64_t token = p.tokens[row];
    float* out = p.residual + (int64_t)row * p.columns + column;
    Vec<T, kOctet> octet;
    const bool known = token >= 0 && token < p.vocab_size;
    if (known)
      octet = Vec<T, kOctet>::load(static_cast<const T*>(p.table) + token * p.columns + column);
#pragma unroll
    for (int i = 0; i < kOctet; i += 4) {
      Vec<float, 4> four;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        four.data[j] = known ? to_float(octet.data[i + j]) : __int_as_float(0x7fffffff);
      four.store(out + i);
    }
  }
}

}  // namespace

Status validate(const EmbedParams& params) {
  RING_REQUIRE(params.rows >= 0, kBadShape, "rows", "0 or more", params.rows);
  RING_REQUIRE(params.columns >= kOctet && params.columns % kOctet == 0, kBadShape, "columns",
               "a multiple of 8", params.columns);
  RING_REQUIRE(params.vocab_size >= 1, kBadShape, "vocab_size", "at least 1", params.vocab_size);
  RING_REQUIRE(params.dtype == DType::kBFloat16 || params.dtype == DType::kFloat16, kBadType, "dtype",
               "bfloat16 or float16", params.dtype);
  if (params.rows == 0) return Status{};
  RING_REQUIRE_POINTER(params, tokens);
  RING_REQUIRE_POINTER(params, table);
  RING_REQUIRE_ALIGNED(params, table);
  RING_REQUIRE_POINTER(params, residual);
  RING_REQUIRE_ALIGNED(params, residual);
  return Status{};
}

size_t workspace_bytes(const EmbedParams&) { return 0; }

Status launch(const EmbedParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  if (params.rows == 0) return Status{};
  constexpr int kMaxGridRows = 4096;
  LaunchShape shape;
  shape.grid = dim3(ceil_div(params.columns / kOctet, kEmbedThreads),
                    params.rows < kMaxGridRows ? params.rows : kMaxGridRows);
  shape.block = dim3(kEmbedThreads);
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  if (params.dtype == DType::kBFloat16) return launch_kernel(embed_kernel<__nv_bfloat16>, shape, params);
  return launch_kernel(embed_kernel<__half>, shape, params);
}

}  // namespace ringkernels
