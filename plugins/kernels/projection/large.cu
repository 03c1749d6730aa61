// Projections of many rows: quantize the rows where needed, then one grouped product.
#include "projection/large.h"

#include "common/check.h"
#include "moe/grouped_plan.cuh"
#include "ringkernels/norm.h"

namespace ringkernels {
namespace {

using namespace grouped;

constexpr int64_t kAlignment = 1024;

// The description of the only group, as the grouped product reads it.
struct OneGroup {
  int32_t tiles[2];
  int32_t rows[2];
  int32_t counts[2];
};

struct Workspace {
  OneGroup* group;
  uint8_t* codes;  // [M, K]
  float* scale;    // [M]
  int64_t bytes;
};

bool quantizes(const ProjectionParams& p) { return is_8bit(p.weight_dtype) && !is_8bit(p.input_dtype); }

Workspace carve(const ProjectionParams& p) {
  char* base = static_cast<char*>(p.workspace);
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* start = base + used;
    used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return start;
  };
  Workspace w = {};
  w.group = reinterpret_cast<OneGroup*>(take(sizeof(OneGroup)));
  if (quantizes(p)) {
    w.codes = reinterpret_cast<uint8_t*>(take(static_cast<int64_t>(p.m) * p.k));
    w.scale = reinterpret_cast<float*>(take(static_cast<int64_t>(p.m) * sizeof(float)));
  }
  w.bytes = used;
  return w;
}

__global__ void describe_kernel(OneGroup* group, OneGroup content) {
  wait_for_previous_kernel();
  *group = content;
}

Status describe(const ProjectionParams& p, const Workspace& w, Stream stream) {
  OneGroup content = {};
  content.tiles[1] = ceil_div(p.n, kWeightTile) * ceil_div(p.m, kTokenTile);
  content.rows[1] = content.counts[0] = p.m;
  LaunchShape shape;
  shape.grid = shape.block = dim3(1);
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  return launch_kernel(describe_kernel, shape, w.group, content);
}

Status quantize(const ProjectionParams& p, const Workspace& w, Stream stream) {
  QuantizeParams rows = {};
  rows.input = p.input;
  rows.quantized = w.codes;
  rows.scale = w.scale;
  rows.input_row_stride = p.input_row_stride;
  rows.rows = p.m;
  rows.columns = p.k;
  rows.dtype = p.input_dtype;
  rows.quantized_dtype = p.weight_dtype;
  rows.scale_kind = ScaleKind::kChannel;
  rows.programmatic_launch = 1;
  return launch(rows, stream);
}

template <Format kFormat>
Status multiply_as(const ProjectionParams& p, const Product& product, Stream stream) {
  int device = 0, multiprocessors = 0, major = 0;
  RING_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device)));
  RING_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)));
  RING_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  if (major == 9 && !kPortableOnly)
    return launch_hopper<kFormat, false>(product, false, p.m, multiprocessors, true, stream);
  return launch_portable<kFormat, false>(product, false, multiprocessors, true, stream);
}

Status multiply(const ProjectionParams& p, const Workspace& w, Stream stream) {
  Product product = {};
  Side& side = product.sides[0];
  side.weights = static_cast<const uint8_t*>(p.weight);
  side.weight_scale = p.weight_scale;
  side.tokens = quantizes(p) ? w.codes : static_cast<const uint8_t*>(p.input);
  side.token_scale = quantizes(p) ? w.scale : p.input_scale;
  side.weight_rows = p.n;
  side.sum_bytes = p.k * static_cast<int>(size_of(p.weight_dtype));
  side.output = p.output;
  product.rows = w.group->rows;
  product.counts = w.group->counts;
  product.tiles = w.group->tiles;
  product.num_experts = product.num_groups = 1;
  product.num_tokens = p.m;
  product.scale_kind = is_8bit(p.weight_dtype) ? p.weight_scale_kind : ScaleKind::kNone;
  product.half = p.output_dtype == DType::kFloat16;
  switch (p.weight_dtype) {
    case DType::kFp8E4M3: return multiply_as<Format::kFp8>(p, product, stream);
    case DType::kInt8: return multiply_as<Format::kInt8>(p, product, stream);
    case DType::kFloat16: return multiply_as<Format::kFloat16>(p, product, stream);
    default: return multiply_as<Format::kBFloat16>(p, product, stream);
  }
}

}  // namespace

Status validate_large_projection(const ProjectionParams& p) {
  RING_REQUIRE(p.prologue == Prologue::kNone, kBadType, "prologue", "none for more than 64 rows", p.prologue);
  RING_REQUIRE(p.accumulate == 0, kBadType, "accumulate", "0 for more than 64 rows", p.accumulate);
  RING_REQUIRE(p.static_scale == nullptr, kBadType, "static_scale", "null for more than 64 rows", 1);
  RING_REQUIRE(p.output_dtype == DType::kBFloat16 || p.output_dtype == DType::kFloat16, kBadType,
               "output_dtype", "bfloat16 or float16 for more than 64 rows", p.output_dtype);
  RING_REQUIRE(p.output_row_stride == p.n, kBadShape, "output_row_stride", "n for more than 64 rows",
               p.output_row_stride);
  RING_REQUIRE_ALIGNED(p, output);
  if (is_8bit(p.weight_dtype)) {
    RING_REQUIRE(p.weight_scale_kind != ScaleKind::kBlock128, kBadType, "weight_scale_kind",
                 "tensor or channel for more than 64 rows", p.weight_scale_kind);
    RING_REQUIRE(p.input_dtype != DType::kFloat32, kBadType, "input_dtype",
                 "bfloat16, float16 or weight_dtype for more than 64 rows", p.input_dtype);
  } else {
    RING_REQUIRE(p.input_dtype == p.weight_dtype, kBadType, "input_dtype",
                 "weight_dtype for more than 64 rows", p.input_dtype);
  }
  RING_REQUIRE(quantizes(p) || p.input_row_stride == p.k, kBadShape, "input_row_stride",
               "k for more than 64 rows", p.input_row_stride);
  RING_REQUIRE_POINTER(p, workspace);
  RING_REQUIRE_ALIGNED(p, workspace);
  RING_REQUIRE(p.workspace_bytes >= carve(p).bytes, kWorkspace, "workspace_bytes",
               "at least workspace_bytes()", p.workspace_bytes);
  return Status{};
}

size_t large_projection_workspace_bytes(const ProjectionParams& p) {
  return static_cast<size_t>(carve(p).bytes);
}

Status launch_large_projection(const ProjectionParams& p, Stream stream) {
  const Workspace w = carve(p);
  RING_RETURN_IF_ERROR(describe(p, w, stream));
  if (quantizes(p)) RING_RETURN_IF_ERROR(quantize(p, w, stream));
  return multiply(p, w, stream);
}

}  // namespace ringkernels
