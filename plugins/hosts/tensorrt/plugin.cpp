#include "plugin.h"

#include <algorithm>
#include <array>
#include <exception>

namespace ringplugins {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

namespace {

constexpr int32_t kFailure = -1;

// The border: runs `body`, turns an exception into a log line and `failed`.
template <typename Result, typename Body>
Result guarded(OpContract const& contract, char const* layer, char const* method, Result failed,
               Body&& body) noexcept {
  auto const where = [&] { return std::string(contract.name) + " plugin of layer " + layer + ", " + method + ": "; };
  try {
    return body();
  } catch (std::exception const& error) {
    log_error(where() + error.what());
  } catch (...) {
    log_error(where() + "unknown exception");
  }
  return failed;
}

bool fits(Element element, DataType type) {
  switch (element) {
    case Element::kFloat: return type == DataType::kBF16 || type == DataType::kHALF;
    case Element::kFp32: return type == DataType::kFLOAT;
    case Element::kInt32: return type == DataType::kINT32;
    case Element::kCode: return type == DataType::kINT8 || type == DataType::kFP8;
  }
  return false;
}

char const* expected_types(Element element) {
  switch (element) {
    case Element::kFloat: return "bf16 or fp16";
    case Element::kFp32: return "fp32";
    case Element::kInt32: return "int32";
    case Element::kCode: return "int8 or fp8_e4m3";
  }
  return "";
}

int32_t first_input_of(OpContract const& contract, Element element) {
  for (int32_t i = 0; i < contract.num_inputs; ++i) {
    if (contract.inputs[i].element == element) {
      return i;
    }
  }
  return kFailure;
}

bool all_known(Dims const& dims) {
  return std::all_of(dims.d, dims.d + dims.nbDims, [](int64_t extent) { return extent >= 0; });
}

}  // namespace

Plugin::Plugin(OpContract const& contract, std::string const& layer, std::unique_ptr<Op> op)
    : contract_(contract), layer_(layer), op_(std::move(op)), serialized_(op_->fields()) {
  collection_.nbFields = static_cast<int32_t>(serialized_.size());
  collection_.fields = serialized_.data();
}

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded<nvinfer1::IPluginV3*>(contract_, layer_.c_str(), "clone", nullptr,
                                       [&] { return new Plugin(contract_, layer_, op_->clone()); });
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext* /*context*/) noexcept { return clone(); }

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept { return &collection_; }

void Plugin::check_counts(int32_t num_inputs, int32_t num_outputs) const {
  if (num_inputs != contract_.num_inputs || num_outputs != contract_.num_outputs) {
    throw PluginError("it has " + std::to_string(num_inputs) + " inputs and " + std::to_string(num_outputs) +
                      " outputs, expected " + std::to_string(contract_.num_inputs) + " and " +
                      std::to_string(contract_.num_outputs));
  }
}

void Plugin::check_types(DataType const* input_types) const {
  for (int32_t i = 0; i < contract_.num_inputs; ++i) {
    auto const& rule = contract_.inputs[i];
    if (!fits(rule.element, input_types[i])) {
      throw PluginError(std::string(contract_.name) + ": " + rule.name + " is " + type_name(input_types[i]) +
                        ", expected " + expected_types(rule.element));
    }
    int32_t const first = first_input_of(contract_, rule.element);
    if (input_types[i] != input_types[first]) {
      throw PluginError(std::string(contract_.name) + ": " + rule.name + " is " + type_name(input_types[i]) +
                        ", expected " + type_name(input_types[first]) + " like " + contract_.inputs[first].name);
    }
  }
  op_->check_types(input_types);
}

Sizes Plugin::matched(Dims const* input_dims) const {
  Sizes sizes = op_->attribute_sizes();
  // Twice: a product such as H*K is resolved when a later tensor has told one of its factors.
  for (int32_t round = 0; round < 2; ++round) {
    for (int32_t i = 0; i < contract_.num_inputs; ++i) {
      match(contract_, contract_.inputs[i], input_dims[i], sizes);
    }
  }
  return sizes;
}

int32_t Plugin::getOutputDataTypes(DataType* output_types, int32_t num_outputs, DataType const* input_types,
                                   int32_t num_inputs) const noexcept {
  return guarded(contract_, layer_.c_str(), "getOutputDataTypes", kFailure, [&] {
    check_counts(num_inputs, num_outputs);
    check_types(input_types);
    for (int32_t i = 0; i < num_outputs; ++i) {
      switch (contract_.outputs[i].element) {
        case Element::kFp32: output_types[i] = DataType::kFLOAT; break;
        case Element::kInt32: output_types[i] = DataType::kINT32; break;
        default: output_types[i] = input_types[first_input_of(contract_, contract_.outputs[i].element)];
      }
    }
    return 0;
  });
}

int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                nvinfer1::DimsExprs const* /*shape_inputs*/, int32_t /*num_shape_inputs*/,
                                nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(contract_, layer_.c_str(), "getOutputShapes", kFailure, [&] {
    check_counts(num_inputs, num_outputs);
    std::array<Dims, kMaxTensors> known{};
    for (int32_t i = 0; i < num_inputs; ++i) {
      known[i].nbDims = inputs[i].nbDims;
      for (int32_t j = 0; j < inputs[i].nbDims; ++j) {
        auto const* extent = inputs[i].d[j];
        known[i].d[j] = extent->isConstant() ? extent->getConstantValue() : kUnknown;
      }
    }
    Sizes const sizes = matched(known.data());
    auto source = [&](DimRule const& rule) -> nvinfer1::IDimensionExpr const* {
      if (int64_t const value = sizes.value(rule); value != kUnknown) {
        return builder.constant(value);
      }
      for (int32_t i = 0; i < num_inputs; ++i) {
        auto const& given = contract_.inputs[i];
        for (int32_t j = 0; j < given.rank; ++j) {
          if (given.dims[j] == rule) {
            return inputs[i].d[inputs[i].nbDims - given.rank + j];
          }
        }
      }
      throw PluginError("an output has a dimension that no input has");
    };
    for (int32_t o = 0; o < num_outputs; ++o) {
      auto const& rule = contract_.outputs[o];
      int32_t rank = 0;
      for (int32_t j = 0; j < rule.rank; ++j) {
        if (rule.dims[j].first == Size::kLeading) {  // as the first input has them
          int32_t const leading = inputs[0].nbDims - (contract_.inputs[0].rank - 1);
          for (; rank < leading; ++rank) {
            outputs[o].d[rank] = inputs[0].d[rank];
          }
        } else {
          outputs[o].d[rank++] = source(rule.dims[j]);
        }
      }
      outputs[o].nbDims = rank;
    }
    return 0;
  });
}

bool Plugin::supportsFormatCombination(int32_t pos, DynamicPluginTensorDesc const* tensors, int32_t num_inputs,
                                       int32_t num_outputs) noexcept {
  return guarded(contract_, layer_.c_str(), "supportsFormatCombination", false, [&] {
    check_counts(num_inputs, num_outputs);
    auto const& rule = pos < num_inputs ? contract_.inputs[pos] : contract_.outputs[pos - num_inputs];
    auto const& found = tensors[pos].desc;
    if (found.format != nvinfer1::TensorFormat::kLINEAR || !fits(rule.element, found.type)) {
      return false;
    }
    int32_t const first = first_input_of(contract_, rule.element);
    bool const shares = rule.element == Element::kFloat || rule.element == Element::kCode;
    return !shares || first < 0 || first >= pos || found.type == tensors[first].desc.type;
  });
}

Call Plugin::sized_call(PluginTensorDesc const* inputs, PluginTensorDesc const* outputs) const {
  std::array<Dims, kMaxTensors> dims{};
  std::array<DataType, kMaxTensors> types{};
  Call call;
  for (int32_t i = 0; i < contract_.num_inputs; ++i) {
    dims[i] = inputs[i].dims;
    types[i] = inputs[i].type;
    call.inputs[i].type = inputs[i].type;
  }
  check_types(types.data());
  call.sizes = matched(dims.data());
  for (int32_t i = 0; i < contract_.num_outputs; ++i) {
    match(contract_, contract_.outputs[i], outputs[i].dims, call.sizes);
    call.outputs[i].type = outputs[i].type;
  }
  return call;
}

int32_t Plugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                                DynamicPluginTensorDesc const* outputs, int32_t num_outputs) noexcept {
  return guarded(contract_, layer_.c_str(), "configurePlugin", kFailure, [&] {
    check_counts(num_inputs, num_outputs);
    std::array<PluginTensorDesc, kMaxTensors> in{};
    std::array<PluginTensorDesc, kMaxTensors> out{};
    for (auto member : {&DynamicPluginTensorDesc::min, &DynamicPluginTensorDesc::opt, &DynamicPluginTensorDesc::max}) {
      auto filled = [member](DynamicPluginTensorDesc const& given) {
        PluginTensorDesc desc = given.desc;
        if ((given.*member).nbDims == desc.dims.nbDims) {
          desc.dims = given.*member;
        }
        return desc;
      };
      std::transform(inputs, inputs + num_inputs, in.begin(), filled);
      std::transform(outputs, outputs + num_outputs, out.begin(), filled);
      sized_call(in.data(), out.data());
    }
    return 0;
  });
}

size_t Plugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                                DynamicPluginTensorDesc const* outputs, int32_t num_outputs) const noexcept {
  return guarded(contract_, layer_.c_str(), "getWorkspaceSize", size_t{0}, [&] {
    check_counts(num_inputs, num_outputs);
    std::array<PluginTensorDesc, kMaxTensors> in{};
    std::array<PluginTensorDesc, kMaxTensors> out{};
    auto largest = [](DynamicPluginTensorDesc const& given) {
      PluginTensorDesc desc = given.desc;
      desc.dims = all_known(given.max) && given.max.nbDims == desc.dims.nbDims ? given.max : desc.dims;
      return desc;
    };
    std::transform(inputs, inputs + num_inputs, in.begin(), largest);
    std::transform(outputs, outputs + num_outputs, out.begin(), largest);
    return op_->reserved_bytes(sized_call(in.data(), out.data()));
  });
}

int32_t Plugin::getAliasedInput(int32_t output) noexcept {
  return output >= 0 && output < contract_.num_outputs ? contract_.outputs[output].alias : -1;
}

int32_t Plugin::onShapeChange(PluginTensorDesc const* inputs, int32_t num_inputs, PluginTensorDesc const* outputs,
                              int32_t num_outputs) noexcept {
  return guarded(contract_, layer_.c_str(), "onShapeChange", kFailure, [&] {
    check_counts(num_inputs, num_outputs);
    sized_call(inputs, outputs);
    return 0;
  });
}

int32_t Plugin::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const* output_descs,
                        void const* const* inputs, void* const* outputs, void* workspace,
                        cudaStream_t stream) noexcept {
  return guarded(contract_, layer_.c_str(), "enqueue", kFailure, [&] {
    Call call = sized_call(input_descs, output_descs);
    for (int32_t i = 0; i < contract_.num_inputs; ++i) {
      call.inputs[i].data = const_cast<void*>(inputs[i]);
    }
    for (int32_t i = 0; i < contract_.num_outputs; ++i) {
      call.outputs[i].data = outputs[i];
    }
    op_->run(call, workspace, op_->workspace_bytes(call), stream);
    return 0;
  });
}

Creator::Creator(OpEntry const& entry) : entry_(entry) {
  collection_.nbFields = static_cast<int32_t>(entry_.declared.size());
  collection_.fields = entry_.declared.data();
}

nvinfer1::IPluginV3* Creator::createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                           nvinfer1::TensorRTPhase phase) noexcept {
  char const* layer = name != nullptr ? name : "?";
  return guarded<nvinfer1::IPluginV3*>(*entry_.contract, layer, "createPlugin", nullptr, [&] {
    if (fields == nullptr) {
      throw PluginError("no attributes are given");
    }
    bool const serialized = phase == nvinfer1::TensorRTPhase::kRUNTIME;
    return new Plugin(*entry_.contract, layer, entry_.make(*fields, serialized));
  });
}

}  // namespace ringplugins
