// rms_norm, group_norm_gate and quantize: checks, and their translation into rows.
#include "common/check.h"
#include "norm/row_kernel.cuh"
#include "ringkernels/norm.h"

namespace ringkernels {
namespace {

constexpr int kMaxColumns = kOctet * kMaxRowOctets * kMaxRowThreads;

bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// The fields that all three share.
template <typename Params>
Status validate_rows(const Params& params) {
  RING_REQUIRE(params.rows >= 0, kBadShape, "rows", "0 or more", params.rows);
  RING_REQUIRE(params.columns >= kOctet && params.columns <= kMaxColumns && params.columns % kOctet == 0,
               kBadShape, "columns", "a multiple of 8 up to 16384", params.columns);
  RING_REQUIRE(is_half(params.dtype), kBadType, "dtype", "bfloat16 or float16", params.dtype);
  RING_REQUIRE_ALIGNED(params, quantized);
  if (params.quantized == nullptr) return Status{};
  RING_REQUIRE(is_8bit(params.quantized_dtype), kBadType, "quantized_dtype", "fp8_e4m3 or int8",
               params.quantized_dtype);
  switch (params.scale_kind) {
    case ScaleKind::kTensor: RING_REQUIRE_POINTER(params, static_scale); break;
    case ScaleKind::kChannel:
    case ScaleKind::kBlock128:
      if (params.static_scale == nullptr) RING_REQUIRE_POINTER(params, scale);
      break;
    default: RING_REQUIRE(false, kBadType, "scale_kind", "tensor, channel or block128", params.scale_kind);
  }
  return Status{};
}

template <typename Params>
Status validate_outputs(const Params& params) {
  RING_REQUIRE_POINTER(params, weight);
  RING_REQUIRE_ALIGNED(params, weight);
  RING_REQUIRE_ALIGNED(params, output);
  RING_REQUIRE(params.output != nullptr || params.quantized != nullptr, kNullPointer, "output",
               "a pointer, or one in quantized", 0);
  return Status{};
}

template <typename Params>
RowArgs row_args(const Params& params) {
  RowArgs args = {};
  args.quantized = params.quantized;
  args.scale = params.scale;
  args.static_scale = params.static_scale;
  args.columns = params.columns;
  args.input_dtype = params.dtype;
  args.dtype = params.dtype;
  args.quantized_dtype = params.quantized_dtype;
  args.scale_kind = params.scale_kind;
  args.layout = RowLayout::of(params.columns, 1);
  return args;
}

#define RING_REQUIRE_STRIDE(params, field)                                                                 \
  RING_REQUIRE((params).field >= (params).columns, kBadShape, #field, "at least columns", (params).field); \
  RING_REQUIRE((params).field % kOctet == 0, kMisaligned, #field, "a multiple of 8", (params).field)

}  // namespace

Status validate(const RmsNormParams& params) {
  RING_RETURN_IF_ERROR(validate_rows(params));
  RING_RETURN_IF_ERROR(validate_outputs(params));
  RING_REQUIRE_POINTER(params, residual);
  RING_REQUIRE_ALIGNED(params, residual);
  RING_REQUIRE_ALIGNED(params, delta);
  RING_REQUIRE(params.residual_dtype == DType::kFloat32 || params.residual_dtype == params.dtype, kBadType,
               "residual_dtype", "float32 or dtype", params.residual_dtype);
  RING_REQUIRE(params.eps >= 0.0f, kBadShape, "eps", "0 or more", params.eps);
  return Status{};
}

size_t workspace_bytes(const RmsNormParams&) { return 0; }

Status launch(const RmsNormParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  RowArgs args = row_args(params);
  args.input = params.residual;
  args.residual = params.residual;
  args.second = params.delta;
  args.weight = params.weight;
  args.output = params.output;
  args.input_stride = params.columns;
  args.second_stride = params.columns;
  args.input_dtype = params.residual_dtype;
  args.eps = params.eps;
  return launch_rows<RowOp::kRmsNorm>(args, params.rows, params.programmatic_launch != 0, stream);
}

Status validate(const GroupNormGateParams& params) {
  RING_RETURN_IF_ERROR(validate_rows(params));
  RING_RETURN_IF_ERROR(validate_outputs(params));
  RING_REQUIRE_POINTER(params, input);
  RING_REQUIRE_ALIGNED(params, input);
  RING_REQUIRE_POINTER(params, gate);
  RING_REQUIRE_ALIGNED(params, gate);
  RING_REQUIRE_STRIDE(params, input_row_stride);
  RING_REQUIRE_STRIDE(params, gate_row_stride);
  RING_REQUIRE(params.num_norm_groups >= 1 && params.num_norm_groups <= kMaxNormGroups &&
                   params.columns % (kOctet * params.num_norm_groups) == 0,
               kBadShape, "num_norm_groups", "1 to 32, and columns a multiple of 8 times it",
               params.num_norm_groups);
  RING_REQUIRE(params.eps >= 0.0f, kBadShape, "eps", "0 or more", params.eps);
  return Status{};
}

size_t workspace_bytes(const GroupNormGateParams&) { return 0; }

Status launch(const GroupNormGateParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  RowArgs args = row_args(params);
  args.input = params.input;
  args.second = params.gate;
  args.weight = params.weight;
  args.output = params.output;
  args.input_stride = params.input_row_stride;
  args.second_stride = params.gate_row_stride;
  args.layout = RowLayout::of(params.columns, params.num_norm_groups);
  args.eps = params.eps;
  return launch_rows<RowOp::kGroupNormGate>(args, params.rows, params.programmatic_launch != 0, stream);
}

Status validate(const QuantizeParams& params) {
  RING_RETURN_IF_ERROR(validate_rows(params));
  RING_REQUIRE_POINTER(params, input);
  RING_REQUIRE_ALIGNED(params, input);
  RING_REQUIRE_POINTER(params, quantized);
  RING_REQUIRE_STRIDE(params, input_row_stride);
  return Status{};
}

size_t workspace_bytes(const QuantizeParams&) { return 0; }

Status launch(const QuantizeParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  RowArgs args = row_args(params);
  args.input = params.input;
  args.input_stride = params.input_row_stride;
  return launch_rows<RowOp::kQuantize>(args, params.rows, params.programmatic_launch != 0, stream);
}

}  // namespace ringkernels
