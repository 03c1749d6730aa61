// The ops: contract tensors become Params of the kernel library.
#include <algorithm>

#include "op.h"
#include "op_contract.h"
#include "ringkernels/attention.h"
#include "ringkernels/linear_attention.h"
#include "ringkernels/moe.h"
#include "ringkernels/projection.h"
#include "rows.h"

namespace ringplugins {

using nvinfer1::DataType;

namespace {

// TensorRT hands out the workspace anew each time; kernels want theirs zeroed.
template <typename Params>
void launch_cleared(OpContract const& contract, Params params, void* workspace, size_t bytes, cudaStream_t stream) {
  params.workspace = workspace;
  params.workspace_bytes = static_cast<int64_t>(bytes);
  clear(contract, workspace, bytes, stream);
  check(contract, ringkernels::launch(params, stream));
}

constexpr size_t kAlignment = 256;

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// What the kernels take input `index`, 8-bit codes, for. TensorRT has no FP8 type on GPUs before sm_89, where the
// kernels do take it: there fp8_bytes says that an int8 tensor holds the bytes of FP8-E4M3 codes.
ringkernels::DType code_type(OpContract const& contract, int32_t index, DataType given, Flag fp8_bytes) {
  if (fp8_bytes == Flag::kOff) {
    return kernel_type(given);
  }
  if (given != DataType::kINT8) {
    throw PluginError(std::string(contract.name) + ": attribute fp8_bytes is 1 and " + contract.inputs[index].name +
                      " is " + type_name(given) + ", expected int8");
  }
  return ringkernels::DType::kFp8E4M3;
}

struct LinearAttentionAttributes {
  int32_t num_heads;
  float query_scale;

  static constexpr auto fields() {
    return std::make_tuple(field("num_heads", &LinearAttentionAttributes::num_heads),
                           field("query_scale", &LinearAttentionAttributes::query_scale));
  }
};
static_assert(fits_contract<LinearAttentionAttributes>(kRingLinearAttention));

class LinearAttentionOp final : public OpWith<LinearAttentionOp, LinearAttentionAttributes> {
 public:
  using OpWith::OpWith;

  size_t workspace_bytes(Call const& call) const override {
    return call.size(Size::kT) == 1 ? ringkernels::workspace_bytes(decode_params(call))
                                    : ringkernels::workspace_bytes(prefill_params(call));
  }

  size_t reserved_bytes(Call const& largest) const override {
    return ringkernels::max_workspace_bytes(prefill_params(largest));
  }

  void run(Call const& call, void* workspace, size_t bytes, cudaStream_t stream) const override {
    size_t const state_bytes =
        sizeof(float) * call.size(Size::kB) * call.size(Size::kH) * call.size(Size::kK) * call.size(Size::kV);
    carry_over(contract_, call, 1, state_bytes, stream);
    if (call.size(Size::kT) == 1) {  // every row has its token: `lengths` is not read
      check(contract_, ringkernels::launch(decode_params(call), stream));
      return;
    }
    auto params = prefill_params(call);
    params.workspace = workspace;
    params.workspace_bytes = static_cast<int64_t>(bytes);
    check(contract_, ringkernels::launch(params, stream));
  }

 private:
  ringkernels::LinearAttentionDecodeParams decode_params(Call const& call) const {
    return shared_params<ringkernels::LinearAttentionDecodeParams>(call);
  }

  ringkernels::LinearAttentionPrefillParams prefill_params(Call const& call) const {
    auto params = shared_params<ringkernels::LinearAttentionPrefillParams>(call);
    params.lengths = call.input<int32_t>(5);
    params.max_length = call.size32(Size::kT);
    return params;
  }

  // What a step and a prefill have in common.
  template <typename Params>
  Params shared_params(Call const& call) const {
    check_value_dim(call);
    Params params{};
    params.query = call.input<void>(0);
    params.key = call.input<void>(1);
    params.value = call.input<void>(2);
    params.state = call.output<float>(1);
    params.log_decay = call.input<float>(4);
    params.output = call.output<void>(0);
    params.row_stride = params.output_row_stride = call.size(Size::kH) * call.size(Size::kK);
    params.batch = call.size32(Size::kB);
    params.num_heads = call.size32(Size::kH);
    params.head_dim = call.size32(Size::kK);
    params.query_scale = attributes_.query_scale;
    params.dtype = kernel_type(call.inputs[0].type);
    return params;
  }

  void check_value_dim(Call const& call) const {
    if (call.size(Size::kK) != call.size(Size::kV)) {
      throw PluginError("the key dim is " + std::to_string(call.size(Size::kK)) + " and the value dim " +
                        std::to_string(call.size(Size::kV)) + ", expected the same");
    }
  }
};

struct AttentionAttributes {
  int32_t num_heads;
  int32_t num_kv_heads;
  float softmax_scale;

  static constexpr auto fields() {
    return std::make_tuple(field("num_heads", &AttentionAttributes::num_heads),
                           field("num_kv_heads", &AttentionAttributes::num_kv_heads),
                           field("softmax_scale", &AttentionAttributes::softmax_scale));
  }
};
static_assert(fits_contract<AttentionAttributes>(kRingAttention));

// New keys and values are appended to the cache first. Many new tokens go through the prefill kernel; a few are rows
// of the decode kernel, which spreads a long context over the whole GPU. Rows go in groups, which bounds the memory.
class AttentionOp final : public OpWith<AttentionOp, AttentionAttributes> {
 public:
  using OpWith::OpWith;

  void check_attributes() const override {
    auto const [heads, kv_heads, scale] = attributes_;
    require(contract_, heads % kv_heads == 0, "num_heads", heads, "a multiple of num_kv_heads", kv_heads);
  }

  size_t workspace_bytes(Call const& call) const override {
    if (call.size(Size::kT) > kFewTokens) {
      return 0;
    }
    int64_t const group = std::min(tokens(call), kGroup);
    // The last group may be small, and few rows are split into more parts than many.
    return Scratch(call, group).bytes() + std::max(row_bytes(call, group), row_bytes(call, tokens(call) % kGroup));
  }

  size_t reserved_bytes(Call const& largest) const override {
    int64_t const few = largest.size(Size::kB) * std::min(largest.size(Size::kT), kFewTokens);
    auto const need = [&](int64_t rows) { return row_bytes(largest, rows); };
    return Scratch(largest, std::min(few, kGroup)).bytes() + largest_need(std::min(few, kGroup), need);
  }

  void run(Call const& call, void* workspace, size_t bytes, cudaStream_t stream) const override {
    int64_t const elements = call.size(Size::kB) * call.size(Size::kKV) * call.size(Size::kS) * call.size(Size::kK);
    for (int32_t output : {1, 2}) {
      carry_over(contract_, call, output, elements * element_bytes(call.inputs[3].type), stream);
    }
    if (call.size(Size::kT) > kFewTokens) {
      check_cuda(contract_, "append to the cache", append(append_params(call, 0, tokens(call)), stream));
      check(contract_, ringkernels::launch(prefill_params(call), stream));
      return;
    }
    run_rows(call, static_cast<char*>(workspace), bytes, stream);
  }

 private:
  static constexpr int64_t kFewTokens = 16;  // of a row
  static constexpr int64_t kGroup = 1024;

  // Two arrays of indices, then keys and values of one group of tokens.
  struct Scratch {
    size_t index_bytes;
    size_t row_bytes;

    Scratch(Call const& call, int64_t group)
        : index_bytes(aligned(sizeof(int32_t) * static_cast<size_t>(group))),
          row_bytes(aligned(element_bytes(call.inputs[0].type) * static_cast<size_t>(group) *
                            static_cast<size_t>(call.size(Size::kH) * call.size(Size::kK)))) {}
    size_t bytes() const { return 2 * index_bytes + 2 * row_bytes; }
  };

  static int64_t tokens(Call const& call) { return call.size(Size::kB) * call.size(Size::kT); }

  size_t row_bytes(Call const& call, int64_t rows) const {
    return ringkernels::workspace_bytes(row_params(call, 0, rows));
  }

  void run_rows(Call const& call, char* base, size_t bytes, cudaStream_t stream) const {
    Scratch const scratch(call, std::min(tokens(call), kGroup));
    for (int64_t first = 0; first < tokens(call); first += kGroup) {
      auto launched = row_params(call, first, std::min(tokens(call) - first, kGroup));
      auto appended = append_params(call, first, launched.batch);
      appended.token_position = reinterpret_cast<int32_t*>(base);
      appended.token_slot = reinterpret_cast<int32_t*>(base + scratch.index_bytes);
      appended.staged_key = base + 2 * scratch.index_bytes;
      appended.staged_value = base + 2 * scratch.index_bytes + scratch.row_bytes;
      appended.staged_stride = launched.row_stride;
      check_cuda(contract_, "append to the cache", append(appended, stream));
      launched.key = appended.staged_key;
      launched.value = appended.staged_value;
      launched.position = appended.token_position;
      launched.slots = appended.token_slot;
      launched.workspace = base + scratch.bytes();
      launched.workspace_bytes = static_cast<int64_t>(bytes - scratch.bytes());
      clear(contract_, launched.workspace, bytes - scratch.bytes(), stream);
      check(contract_, ringkernels::launch(launched, stream));
    }
  }

  static AppendParams append_params(Call const& call, int64_t first, int64_t count) {
    AppendParams params{};
    params.key = call.input<void>(1);
    params.value = call.input<void>(2);
    params.key_cache = call.output<void>(1);
    params.value_cache = call.output<void>(2);
    params.position = call.input<int32_t>(5);
    params.lengths = call.input<int32_t>(6);
    params.first_token = first;
    params.num_tokens = static_cast<int32_t>(count);
    params.max_length = call.size32(Size::kT);
    params.num_kv_heads = call.size32(Size::kKV);
    params.head_dim = call.size32(Size::kK);
    params.capacity = call.size(Size::kS);
    params.element_bytes = static_cast<int32_t>(element_bytes(call.inputs[1].type));
    return params;
  }

  ringkernels::AttentionPrefillParams prefill_params(Call const& call) const {
    auto params = shared_params<ringkernels::AttentionPrefillParams>(call);
    params.query = call.input<void>(0);
    params.position = call.input<int32_t>(5);
    params.lengths = call.input<int32_t>(6);
    params.output = call.output<void>(0);
    params.batch = call.size32(Size::kB);
    params.max_length = call.size32(Size::kT);
    return params;
  }

  // Tokens [first, first + count) of the call, each as a row.
  ringkernels::AttentionDecodeParams row_params(Call const& call, int64_t first, int64_t count) const {
    auto params = shared_params<ringkernels::AttentionDecodeParams>(call);
    if (call.inputs[0].data != nullptr) {
      int64_t const offset = first * params.row_stride * static_cast<int64_t>(element_bytes(call.inputs[0].type));
      params.query = call.input<char>(0) + offset;
      params.output = call.output<char>(0) + offset;
    }
    params.batch = static_cast<int32_t>(count);
    params.max_context = params.capacity;
    params.cache_dtype = params.dtype;
    return params;
  }

  // What a step and a prefill have in common.
  template <typename Params>
  Params shared_params(Call const& call) const {
    Params params{};
    params.key_cache = call.output<void>(1);
    params.value_cache = call.output<void>(2);
    params.row_stride = params.output_row_stride = call.size(Size::kH) * call.size(Size::kK);
    params.capacity = call.size(Size::kS);
    params.num_heads = call.size32(Size::kH);
    params.num_kv_heads = call.size32(Size::kKV);
    params.head_dim = call.size32(Size::kK);
    params.softmax_scale = attributes_.softmax_scale;
    params.dtype = kernel_type(call.inputs[0].type);
    return params;
  }
};

struct RouterAttributes {
  int32_t num_experts;
  int32_t top_k;
  int32_t n_group;
  int32_t topk_group;
  Flag normalize;
  float routed_scaling_factor;

  static constexpr auto fields() {
    return std::make_tuple(field("num_experts", &RouterAttributes::num_experts),
                           field("top_k", &RouterAttributes::top_k), field("n_group", &RouterAttributes::n_group),
                           field("topk_group", &RouterAttributes::topk_group),
                           field("normalize", &RouterAttributes::normalize),
                           field("routed_scaling_factor", &RouterAttributes::routed_scaling_factor));
  }
};
static_assert(fits_contract<RouterAttributes>(kRingRouter));

class RouterOp final : public OpWith<RouterOp, RouterAttributes> {
 public:
  using OpWith::OpWith;

  void check_attributes() const override {
    auto const& a = attributes_;
    require(contract_, a.num_experts % a.n_group == 0, "n_group", a.n_group, "a divisor of num_experts", a.num_experts);
    require(contract_, a.topk_group <= a.n_group, "topk_group", a.topk_group, "at most n_group", a.n_group);
    int32_t const open = a.num_experts / a.n_group * a.topk_group;
    require(contract_, a.top_k <= open, "top_k", a.top_k, "at most the experts of topk_group groups", open);
  }

  size_t workspace_bytes(Call const& call) const override { return ringkernels::workspace_bytes(params(call)); }

  size_t reserved_bytes(Call const& largest) const override {
    return ringkernels::max_workspace_bytes(params(largest));
  }

  void run(Call const& call, void* workspace, size_t bytes, cudaStream_t stream) const override {
    launch_cleared(contract_, params(call), workspace, bytes, stream);
  }

 private:
  ringkernels::RouterParams params(Call const& call) const {
    ringkernels::RouterParams params{};
    params.hidden = call.input<void>(0);
    params.router_weight = call.input<float>(1);
    params.expert_bias = call.input<float>(2);
    params.expert_ids = call.output<int32_t>(0);
    params.routing_weights = call.output<float>(1);
    params.tokens = call.size32(Size::kN);
    params.hidden_size = call.size32(Size::kD);
    params.num_experts = attributes_.num_experts;
    params.top_k = attributes_.top_k;
    params.n_group = attributes_.n_group;
    params.topk_group = attributes_.topk_group;
    params.normalize = attributes_.normalize == Flag::kOn;
    params.routed_scaling_factor = attributes_.routed_scaling_factor;
    params.hidden_dtype = kernel_type(call.inputs[0].type);
    return params;
  }
};

struct ExpertsAttributes {
  int32_t num_experts;
  int32_t top_k;

  static constexpr auto fields() {
    return std::make_tuple(field("num_experts", &ExpertsAttributes::num_experts),
                           field("top_k", &ExpertsAttributes::top_k));
  }
};
static_assert(fits_contract<ExpertsAttributes>(kRingExperts));

struct QuantizedExpertsAttributes : ExpertsAttributes {
  Flag fp8_bytes;

  static constexpr auto fields() {
    return std::tuple_cat(ExpertsAttributes::fields(),
                          std::make_tuple(field("fp8_bytes", &QuantizedExpertsAttributes::fp8_bytes)));
  }
};
static_assert(fits_contract<QuantizedExpertsAttributes>(kRingQuantizedExperts));

// RingExperts and RingQuantizedExperts: the latter has a scale behind each of the two matrices.
template <typename Attributes>
class ExpertsOp final : public OpWith<ExpertsOp<Attributes>, Attributes> {
  using Base = OpWith<ExpertsOp, Attributes>;
  using Base::attributes_;
  using Base::contract_;

 public:
  using Base::Base;

  void check_types(DataType const* inputs) const override { weight_type(inputs[3]); }

  size_t workspace_bytes(Call const& call) const override { return ringkernels::workspace_bytes(params(call)); }

  size_t reserved_bytes(Call const& largest) const override {
    return largest_need(largest.size(Size::kN),
                        [&](int64_t count) { return workspace_bytes(largest.with(Size::kN, count)); });
  }

  void run(Call const& call, void* workspace, size_t bytes, cudaStream_t stream) const override {
    auto launched = params(call);
    launched.workspace = workspace;
    launched.workspace_bytes = static_cast<int64_t>(bytes);
    clear(contract_, workspace, ringkernels::zeroed_workspace_bytes(launched), stream);
    check(contract_, ringkernels::launch(launched, stream));
  }

 private:
  static constexpr bool kQuantized = std::is_same_v<Attributes, QuantizedExpertsAttributes>;

  ringkernels::DType weight_type(DataType given) const {
    if constexpr (kQuantized) {
      return code_type(contract_, 3, given, attributes_.fp8_bytes);
    } else {
      return kernel_type(given);
    }
  }

  ringkernels::ExpertsParams params(Call const& call) const {
    ringkernels::ExpertsParams params{};
    params.hidden = call.input<void>(0);
    params.expert_ids = call.input<int32_t>(1);
    params.routing_weights = call.input<float>(2);
    params.gate_up_proj = call.input<void>(3);
    params.down_proj = call.input<void>(kQuantized ? 5 : 4);
    if (kQuantized) {
      params.gate_up_scale = call.input<float>(4);
      params.down_scale = call.input<float>(6);
      params.scale_kind = ringkernels::ScaleKind::kChannel;
    }
    params.output = call.output<void>(0);
    params.tokens = call.size32(Size::kN);
    params.hidden_size = call.size32(Size::kD);
    params.intermediate_size = call.size32(Size::kI);
    params.num_experts = attributes_.num_experts;
    params.top_k = attributes_.top_k;
    params.dtype = params.output_dtype = kernel_type(call.inputs[0].type);
    params.weight_dtype = weight_type(call.inputs[3].type);
    return params;
  }
};

struct ProjectionAttributes {
  Flag fp8_bytes;

  static constexpr auto fields() { return std::make_tuple(field("fp8_bytes", &ProjectionAttributes::fp8_bytes)); }
};
static_assert(fits_contract<ProjectionAttributes>(kRingQuantizedProjection));

class ProjectionOp final : public OpWith<ProjectionOp, ProjectionAttributes> {
 public:
  using OpWith::OpWith;

  void check_types(DataType const* inputs) const override { weight_type(inputs[1]); }

  size_t workspace_bytes(Call const& call) const override { return ringkernels::workspace_bytes(params(call)); }

  size_t reserved_bytes(Call const& largest) const override {
    return largest_need(largest.size(Size::kLeading),
                        [&](int64_t count) { return workspace_bytes(largest.with(Size::kLeading, count)); });
  }

  void run(Call const& call, void* workspace, size_t bytes, cudaStream_t stream) const override {
    auto launched = params(call);
    launched.workspace = bytes > 0 ? workspace : nullptr;
    launched.workspace_bytes = static_cast<int64_t>(bytes);
    check(contract_, ringkernels::launch(launched, stream));
  }

 private:
  ringkernels::DType weight_type(DataType given) const { return code_type(contract_, 1, given, attributes_.fp8_bytes); }

  ringkernels::ProjectionParams params(Call const& call) const {
    ringkernels::ProjectionParams params{};
    params.m = call.size32(Size::kLeading);
    params.n = call.size32(Size::kO);
    params.k = call.size32(Size::kD);
    params.input_row_stride = params.k;
    params.output_row_stride = params.n;
    params.input = call.input<void>(0);
    params.output = call.output<void>(0);
    params.weight = call.input<void>(1);
    params.weight_scale = call.input<float>(2);
    params.input_dtype = params.output_dtype = kernel_type(call.inputs[0].type);
    params.weight_dtype = weight_type(call.inputs[1].type);
    params.weight_scale_kind = ringkernels::ScaleKind::kChannel;
    return params;
  }
};

template <typename Made, OpContract const& contract, typename Attributes>
OpEntry entry() {
  MakeOp const make = [](nvinfer1::PluginFieldCollection const& fields, bool is_serialized) -> std::unique_ptr<Op> {
    auto op = std::make_unique<Made>(contract, parse_fields<Attributes>(contract.name, fields, is_serialized));
    op->check_attributes();
    return op;
  };
  std::vector<nvinfer1::PluginField> declared;
  for (int32_t i = 0; i < contract.num_attributes; ++i) {
    auto const& attribute = contract.attributes[i];
    auto const type = attribute.is_real ? FieldTypeOf<float>::kType : FieldTypeOf<int32_t>::kType;
    declared.emplace_back(attribute.name, nullptr, type, 1);
  }
  return {&contract, make, declared};
}

}  // namespace

std::vector<OpEntry> const& op_table() {
  static std::vector<OpEntry> const table = {
      entry<LinearAttentionOp, kRingLinearAttention, LinearAttentionAttributes>(),
      entry<AttentionOp, kRingAttention, AttentionAttributes>(),
      entry<RouterOp, kRingRouter, RouterAttributes>(),
      entry<ExpertsOp<ExpertsAttributes>, kRingExperts, ExpertsAttributes>(),
      entry<ExpertsOp<QuantizedExpertsAttributes>, kRingQuantizedExperts, QuantizedExpertsAttributes>(),
      entry<ProjectionOp, kRingQuantizedProjection, ProjectionAttributes>(),
  };
  return table;
}

}  // namespace ringplugins
