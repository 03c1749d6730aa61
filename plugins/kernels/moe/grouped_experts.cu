// Experts for many tokens: workspace, and the chain of launches.
#include "moe/grouped_experts.h"

#include <algorithm>

#include "common/check.h"
#include "moe/grouped_sort.cuh"

namespace ringkernels {
namespace {

using namespace grouped;

constexpr int64_t kAlignment = 1024;
constexpr int kPadding = 4;  // scales of kBlock128: rows of a multiple of 16 bytes

// Everything between the launches. Only `counter` must be zero before a launch, and is after it.
struct Workspace {
  int32_t* counter;
  int32_t* rank;
  int32_t* block_first;
  int32_t* rows;
  int32_t* counts;
  int32_t* tiles[2];
  int32_t* pair_rows;
  uint8_t* tokens[2];  // input of the first product: routed, shared
  float* token_scale[2];
  void* gated[2];     // its output, 16-bit
  uint8_t* codes[2];  // that, quantized
  float* code_scale[2];
  void* products[2];  // output of the second product, 16-bit
  int32_t scale_stride[2];
  int64_t bytes;
};

int64_t element_bytes(const ExpertsParams& p) { return static_cast<int64_t>(size_of(p.weight_dtype)); }
bool has_shared(const ExpertsParams& p) { return p.shared_intermediate_size > 0; }

// At most: the first row of each expert is aligned.
int64_t routed_rows(const ExpertsParams& p) {
  return static_cast<int64_t>(p.tokens) * p.top_k + static_cast<int64_t>(p.num_experts) * (kRowAlignment - 1);
}

Workspace carve(const ExpertsParams& p) {
  Workspace w = {};
  char* base = static_cast<char*>(p.workspace);
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t bytes) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
    used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  };
  const auto take_void = [&](void*& pointer, int64_t bytes) {
    char* bytes_pointer = nullptr;
    take(bytes_pointer, bytes);
    pointer = bytes_pointer;
  };
  const int64_t pairs = static_cast<int64_t>(p.tokens) * p.top_k;
  const int64_t groups = p.num_experts + 2;
  take(w.counter, kGroupedCounterBytes);
  take(w.rank, pairs * 4);
  take(w.block_first, (pairs + kSortThreads - 1) / kSortThreads * p.num_experts * 4);
  take(w.rows, groups * 4);
  take(w.counts, groups * 4);
  for (auto& tiles : w.tiles) take(tiles, groups * 4);
  take(w.pair_rows, pairs * 4);
  const bool quantized = is_8bit(p.weight_dtype);
  for (int side = 0; side < (has_shared(p) ? 2 : 1); ++side) {
    const int64_t rows = side == 0 ? routed_rows(p) : p.tokens;
    const int64_t width = side == 0 ? p.intermediate_size : p.shared_intermediate_size;
    w.scale_stride[side] = static_cast<int32_t>((rows + kPadding - 1) / kPadding * kPadding);
    const int64_t first_blocks = p.scale_kind == ScaleKind::kBlock128 ? (p.hidden_size + 127) / 128 : 1;
    const int64_t second_blocks = p.scale_kind == ScaleKind::kBlock128 ? (width + 127) / 128 : 1;
    // Without quantization the shared expert reads `hidden` itself.
    if (quantized || side == 0) take(w.tokens[side], rows * p.hidden_size * element_bytes(p));
    take_void(w.gated[side], rows * width * 2);
    take_void(w.products[side], rows * p.hidden_size * 2);
    if (!quantized) continue;
    take(w.token_scale[side], first_blocks * w.scale_stride[side] * 4);
    take(w.codes[side], rows * width);
    take(w.code_scale[side], second_blocks * w.scale_stride[side] * 4);
  }
  w.bytes = used;
  return w;
}

Status sort(const ExpertsParams& p, const Workspace& w, Stream stream) {
  SortParams sort = {};
  sort.expert_ids = p.expert_ids;
  sort.rank = w.rank;
  sort.block_first = w.block_first;
  sort.rows = w.rows;
  sort.counts = w.counts;
  sort.counter = w.counter;
  sort.pairs = p.tokens * p.top_k;
  sort.num_experts = p.num_experts;
  sort.shared_tokens = has_shared(p) ? p.tokens : 0;
  const int widths[2] = {p.intermediate_size, p.shared_intermediate_size};
  for (int product = 0; product < 2; ++product) {
    sort.tiles[product] = w.tiles[product];
    for (int side = 0; side < 2; ++side)
      sort.weight_tiles[product][side] =
          ceil_div(product == 0 ? 2 * widths[side] : p.hidden_size, kWeightTile);
  }
  LaunchShape shape;
  shape.grid = dim3(ceil_div(sort.pairs, kSortThreads));
  shape.block = dim3(kSortThreads);
  shape.shared_bytes = 32 * p.num_experts * sizeof(uint16_t);
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  return launch_kernel(sort_kernel, shape, sort);
}

RowFormat row_format(const ExpertsParams& p, const float* static_scale) {
  RowFormat format = {};
  format.static_scale = static_scale;
  format.block_scale = p.scale_kind == ScaleKind::kBlock128;
  format.int8 = p.weight_dtype == DType::kInt8;
  return format;
}

Status permute(const ExpertsParams& p, const Workspace& w, Stream stream) {
  PermuteParams permute = {};
  const bool quantized = is_8bit(p.weight_dtype);
  permute.expert_ids = p.expert_ids;
  permute.rank = w.rank;
  permute.block_first = w.block_first;
  permute.rows = w.rows;
  permute.pair_rows = w.pair_rows;
  permute.top_k = p.top_k;
  permute.num_experts = p.num_experts;
  permute.row_bytes = p.hidden_size * static_cast<int>(element_bytes(p));
  for (int side = 0; side < 2; ++side) {
    permute.output[side] = w.tokens[side];
    permute.scale[side] = w.token_scale[side];
    permute.scale_stride[side] = w.scale_stride[side];
  }
  if (quantized) permute.format = row_format(p, p.gate_up_input_scale);
  if (p.quantized_hidden != nullptr) permute.format.given_scale = p.hidden_scale;
  permute.hidden = quantized && p.quantized_hidden != nullptr ? p.quantized_hidden : p.hidden;
  LaunchShape shape;
  shape.grid = dim3(p.tokens);
  shape.block = dim3(kPermuteThreads);
  shape.stream = stream;
  shape.programmatic = true;
  if (!quantized || p.quantized_hidden != nullptr)
    return launch_kernel(permute_kernel<uint8_t>, shape, permute);
  return p.dtype == DType::kFloat16 ? launch_kernel(permute_kernel<__half>, shape, permute)
                                    : launch_kernel(permute_kernel<__nv_bfloat16>, shape, permute);
}

Status quantize_between(const ExpertsParams& p, const Workspace& w, int multiprocessors, Stream stream) {
  QuantizeRowsParams quantize = {};
  for (int side = 0; side < 2; ++side) {
    quantize.input[side] = w.gated[side];
    quantize.output[side] = w.codes[side];
    quantize.scale[side] = w.code_scale[side];
    quantize.scale_stride[side] = w.scale_stride[side];
  }
  quantize.width[0] = p.intermediate_size;
  quantize.width[1] = p.shared_intermediate_size;
  quantize.routed_rows = w.rows + p.num_experts;
  quantize.shared_rows = has_shared(p) ? p.tokens : 0;
  quantize.format = row_format(p, p.down_input_scale);
  LaunchShape shape;
  const int64_t rows = routed_rows(p) + quantize.shared_rows;
  shape.grid = dim3(static_cast<unsigned>(std::min<int64_t>((rows + 7) / 8, multiprocessors * 32)));
  shape.block = dim3(256);
  shape.stream = stream;
  shape.programmatic = true;
  return p.dtype == DType::kFloat16 ? launch_kernel(quantize_rows_kernel<__half>, shape, quantize)
                                    : launch_kernel(quantize_rows_kernel<__nv_bfloat16>, shape, quantize);
}

template <typename Source>
Status combine_as(const ExpertsParams& p, const LaunchShape& shape, const CombineParams& combine) {
  return p.output_dtype == DType::kFloat32 ? launch_kernel(combine_kernel<Source, float>, shape, combine)
                                           : launch_kernel(combine_kernel<Source, Source>, shape, combine);
}

Status combine(const ExpertsParams& p, const Workspace& w, Stream stream) {
  CombineParams combine = {};
  combine.routed = w.products[0];
  combine.shared = has_shared(p) ? w.products[1] : nullptr;
  combine.pair_rows = w.pair_rows;
  combine.routing_weights = p.routing_weights;
  combine.output = p.output;
  combine.hidden_size = p.hidden_size;
  combine.top_k = p.top_k;
  combine.accumulate = p.accumulate;
  LaunchShape shape;
  shape.grid = dim3(p.tokens);
  shape.block = dim3(256);
  shape.stream = stream;
  shape.programmatic = true;
  return p.dtype == DType::kFloat16 ? combine_as<__half>(p, shape, combine)
                                    : combine_as<__nv_bfloat16>(p, shape, combine);
}

Product product_of(const ExpertsParams& p, const Workspace& w, bool first) {
  Product product = {};
  const bool quantized = is_8bit(p.weight_dtype);
  const int widths[2] = {p.intermediate_size, p.shared_intermediate_size};
  const void* const weights[2][2] = {{p.down_proj, p.shared_down}, {p.gate_up_proj, p.shared_gate_up}};
  const float* const scales[2][2] = {{p.down_scale, p.shared_down_scale},
                                     {p.gate_up_scale, p.shared_gate_up_scale}};
  for (int index = 0; index < 2; ++index) {
    Side& side = product.sides[index];
    side.weights = static_cast<const uint8_t*>(weights[first][index]);
    side.weight_scale = scales[first][index];
    side.scale_stride = w.scale_stride[index];
    side.weight_rows = first ? 2 * widths[index] : p.hidden_size;
    side.sum_bytes = (first ? p.hidden_size : widths[index]) * static_cast<int>(element_bytes(p));
    side.output = first ? w.gated[index] : w.products[index];
    if (quantized) {
      side.tokens = first ? w.tokens[index] : w.codes[index];
      side.token_scale = first ? w.token_scale[index] : w.code_scale[index];
    } else if (first) {
      side.tokens = index == 0 ? w.tokens[0] : static_cast<const uint8_t*>(p.hidden);
    } else {
      side.tokens = static_cast<const uint8_t*>(w.gated[index]);
    }
  }
  product.rows = w.rows;
  product.counts = w.counts;
  product.tiles = w.tiles[first ? 0 : 1];
  product.num_experts = p.num_experts;
  product.num_groups = p.num_experts + (has_shared(p) ? 1 : 0);
  product.num_tokens = p.tokens;
  product.scale_kind = quantized ? p.scale_kind : ScaleKind::kNone;
  product.half = p.dtype == DType::kFloat16;
  return product;
}

struct Device {
  int multiprocessors = 0;
  bool hopper = false;
};

Status query_device(Device* device) {
  int index = 0, major = 0;
  RING_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&index)));
  RING_RETURN_IF_ERROR(
      cuda_status(cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount, index)));
  RING_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)));
  device->hopper = major == 9 && !kPortableOnly;
  return Status{};
}

template <Format kFormat, bool kBlockScale>
Status multiply_as(const ExpertsParams& p, const Workspace& w, bool first, const Device& device,
                   Stream stream) {
  const Product product = product_of(p, w, first);
  if (!device.hopper)
    return launch_portable<kFormat, kBlockScale>(product, first, device.multiprocessors, true, stream);
  return launch_hopper<kFormat, kBlockScale>(product, first, routed_rows(p), device.multiprocessors, true,
                                             stream);
}

Status multiply(const ExpertsParams& p, const Workspace& w, bool first, const Device& device, Stream stream) {
  switch (p.weight_dtype) {
    case DType::kFp8E4M3:
      return p.scale_kind == ScaleKind::kBlock128
                 ? multiply_as<Format::kFp8, true>(p, w, first, device, stream)
                 : multiply_as<Format::kFp8, false>(p, w, first, device, stream);
    case DType::kInt8:
      return multiply_as<Format::kInt8, false>(p, w, first, device, stream);
    case DType::kFloat16:
      return multiply_as<Format::kFloat16, false>(p, w, first, device, stream);
    default:
      return multiply_as<Format::kBFloat16, false>(p, w, first, device, stream);
  }
}

}  // namespace

bool grouped_experts_supports(const ExpertsParams& p) {
  const bool block = p.scale_kind == ScaleKind::kBlock128;
  return p.norm_weight == nullptr && p.top_k <= kMaxTopK && p.num_experts <= kMaxExperts &&
         p.hidden_size % 128 == 0 && p.intermediate_size % 32 == 0 && p.shared_intermediate_size % 32 == 0 &&
         !(block && p.weight_dtype == DType::kInt8) &&
         static_cast<int64_t>(p.tokens) * p.top_k < (int64_t{1} << 31);
}

size_t grouped_experts_workspace_bytes(const ExpertsParams& p) { return static_cast<size_t>(carve(p).bytes); }

// The counter, which lies first.
size_t grouped_experts_zeroed_bytes(const ExpertsParams& /*p*/) { return kGroupedCounterBytes; }

Status launch_grouped_experts(const ExpertsParams& p, Stream stream) {
  if (p.tokens == 0) return Status{};
  Device device;
  RING_RETURN_IF_ERROR(query_device(&device));
  const Workspace w = carve(p);
  RING_RETURN_IF_ERROR(sort(p, w, stream));
  RING_RETURN_IF_ERROR(permute(p, w, stream));
  RING_RETURN_IF_ERROR(multiply(p, w, true, device, stream));
  if (is_8bit(p.weight_dtype)) RING_RETURN_IF_ERROR(quantize_between(p, w, device.multiprocessors, stream));
  RING_RETURN_IF_ERROR(multiply(p, w, false, device, stream));
  return combine(p, w, stream);
}

}  // namespace ringkernels
