// One block per row: read it once, keep it in registers, share its sums, write it normed and/or quantized.
#pragma once

#include "common/launch.cuh"
#include "norm/row_math.cuh"

namespace ringkernels {

constexpr int kMaxRowThreads = 512;
constexpr int kMaxRowOctets = 4;  // that a thread keeps

enum class RowOp { kQuantize, kRmsNorm, kGroupNormGate };

struct RowArgs {
  const void* input;    // [N, D] rows of input_stride elements, input_dtype
  const void* second;   // [N, D] rows of second_stride elements, dtype: delta or gate; null: no delta
  void* residual;       // input, to be written with delta added, or null
  const float* weight;  // [D]
  void* output;         // [N, D] dtype or null
  void* quantized;      // [N, D] or null
  float* scale;         // [N] or [N, ceil(D / 128)]
  const float* static_scale;
  int64_t input_stride;
  int64_t second_stride;
  RowLayout layout;
  int columns;
  float eps;
  DType input_dtype;
  DType dtype;
  DType quantized_dtype;
  ScaleKind scale_kind;
};

// What is left to be multiplied by 1 / rms: input * weight (* sigmoid(gate)). The norm's factor comes last,
// so that the largest magnitude of the normed row follows exactly from that of these products.
template <RowOp kOp>
__device__ __forceinline__ float2 products(const RowArgs& args, const RawOctet& raw, const RawOctet& second,
                                           const RawOctet& weight, int64_t residual_index,
                                           float (&x)[kOctet]) {
  unpack(raw, args.input_dtype, x);
  float other[kOctet], w[kOctet];
  if (kOp == RowOp::kQuantize) return make_float2(0.0f, largest_of(x));
  if (kOp == RowOp::kGroupNormGate || args.second != nullptr) unpack(second, args.dtype, other);
  if (kOp == RowOp::kRmsNorm && args.second != nullptr) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] += other[i];
    store_octet(args.residual, residual_index, args.input_dtype, x);
    if (args.input_dtype != DType::kFloat32) {  // the norm sees the residual as it is stored
      RawOctet rounded;
      rounded.low = pack_half(x, args.input_dtype);
      rounded.high = make_uint4(0, 0, 0, 0);
      unpack(rounded, args.input_dtype, x);
    }
  }
  unpack(weight, DType::kFloat32, w);
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    squares = fmaf(x[i], x[i], squares);
    x[i] *= kOp == RowOp::kGroupNormGate ? w[i] * sigmoid(other[i]) : w[i];
  }
  return make_float2(squares, largest_of(x));
}

template <RowOp kOp, int kOctets>
__global__ void __launch_bounds__(kMaxRowThreads) row_kernel(RowArgs args) {
  extern __shared__ float2 partials[];
  const int64_t row = blockIdx.x;
  const int octets = args.columns / kOctet;
  RawOctet raw[kOctets], second[kOctets], weight[kOctets];
  float x[kOctets][kOctet];

#pragma unroll
  for (int v = 0; v < kOctets; ++v) {
    const int octet = threadIdx.x + v * blockDim.x;
    if (kOp != RowOp::kQuantize && octet < octets)
      weight[v] = load_raw(args.weight, octet * kOctet, DType::kFloat32);
  }
  wait_for_previous_kernel();
  allow_next_kernel();
#pragma unroll
  for (int v = 0; v < kOctets; ++v) {
    const int octet = threadIdx.x + v * blockDim.x;
    if (octet >= octets) continue;
    raw[v] = load_raw(args.input, row * args.input_stride + octet * kOctet, args.input_dtype);
    if (kOp != RowOp::kQuantize && args.second != nullptr)
      second[v] = load_raw(args.second, row * args.second_stride + octet * kOctet, args.dtype);
  }
#pragma unroll
  for (int v = 0; v < kOctets; ++v) {
    const int octet = threadIdx.x + v * blockDim.x;
    float2 sums = make_float2(0.0f, 0.0f);
    if (octet < octets)
      sums =
          products<kOp>(args, raw[v], second[v], weight[v], row * args.input_stride + octet * kOctet, x[v]);
    leave_partial(partials, args.layout, octet, octet < octets, sums);
  }
  __syncthreads();
  const RowStats stats = gather_row(partials, args.layout, kOp == RowOp::kQuantize ? -1.0f : args.eps);

  float scale = 0.0f;
  if (args.quantized != nullptr && args.scale_kind != ScaleKind::kBlock128) {
    scale = args.static_scale != nullptr ? *args.static_scale
                                         : dynamic_scale(stats.largest, args.quantized_dtype);
    if (threadIdx.x == 0 && args.static_scale == nullptr) args.scale[row] = scale;
  }
#pragma unroll
  for (int v = 0; v < kOctets; ++v) {
    const int octet = threadIdx.x + v * blockDim.x;
    const float factor = stats.factor(args.layout, octet);
    const bool inside = octet < octets;
    if (inside && kOp != RowOp::kQuantize) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[v][i] *= factor;
      if (args.output != nullptr)
        store_octet(args.output, row * args.columns + octet * kOctet, args.dtype, x[v]);
    }
    if (args.quantized == nullptr) continue;
    if (args.scale_kind == ScaleKind::kBlock128) {
      scale = dynamic_scale(block_max(inside ? largest_of(x[v]) : 0.0f), args.quantized_dtype);
      if (args.static_scale != nullptr) scale = *args.static_scale;
      const int blocks = (args.columns + kScaleBlock - 1) / kScaleBlock;
      if (inside && octet % 16 == 0 && args.static_scale == nullptr)
        args.scale[row * blocks + octet / 16] = scale;
    }
    if (inside)
      *reinterpret_cast<uint2*>(static_cast<char*>(args.quantized) + row * args.columns + octet * kOctet) =
          quantize_octet(x[v], scale, args.quantized_dtype);
  }
}

template <RowOp kOp>
Status launch_rows(const RowArgs& args, int rows, bool programmatic, Stream stream) {
  if (rows == 0) return Status{};
  const int octets = args.columns / kOctet;
  LaunchShape shape;
  shape.grid = dim3((unsigned)rows);
  shape.shared_bytes = (size_t)args.layout.partials() * sizeof(float2);
  shape.stream = stream;
  shape.programmatic = programmatic;
  const int per_thread = octets <= kMaxRowThreads ? 1 : octets <= 2 * kMaxRowThreads ? 2 : kMaxRowOctets;
  shape.block = dim3((unsigned)((octets + per_thread - 1) / per_thread + 31) / 32 * 32);
  switch (per_thread) {
    case 1: return launch_kernel(row_kernel<kOp, 1>, shape, args);
    case 2: return launch_kernel(row_kernel<kOp, 2>, shape, args);
    default: return launch_kernel(row_kernel<kOp, kMaxRowOctets>, shape, args);
  }
}

}  // namespace ringkernels
