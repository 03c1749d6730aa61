// One plugin class for all ops: it follows the contract, the op does the work.
#pragma once

#include <NvInferRuntime.h>

#include <memory>
#include <string>
#include <vector>

#include "op.h"

namespace ringplugins {

inline constexpr char const* kPluginNamespace = "ringexport";
inline constexpr char const* kPluginVersion = "1";

// Every method of TensorRT's interfaces is noexcept: what goes wrong inside is logged with the name of the op and
// the shapes, and reported as an error code.
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuildV2,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // layer: its name in the network, for messages.
  Plugin(OpContract const& contract, std::string const& layer, std::unique_ptr<Op> op);

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  char const* getPluginName() const noexcept override { return contract_.name; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuildV2
  int32_t getNbOutputs() const noexcept override { return contract_.num_outputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                             nvinfer1::DataType const* input_types, int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                          nvinfer1::DimsExprs const* shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                          nvinfer1::DynamicPluginTensorDesc const* outputs,
                          int32_t num_outputs) const noexcept override;
  int32_t getAliasedInput(int32_t output) noexcept override;
  char const* getMetadataString() noexcept override { return contract_.name; }

  // IPluginV3OneRuntime
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t num_outputs) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  void check_counts(int32_t num_inputs, int32_t num_outputs) const;
  void check_types(nvinfer1::DataType const* input_types) const;
  Sizes matched(nvinfer1::Dims const* input_dims) const;
  Call sized_call(nvinfer1::PluginTensorDesc const* inputs, nvinfer1::PluginTensorDesc const* outputs) const;

  OpContract const& contract_;
  std::string layer_;
  std::unique_ptr<Op> op_;
  std::vector<nvinfer1::PluginField> serialized_;
  nvinfer1::PluginFieldCollection collection_;
};

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(OpEntry const& entry);

  nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return entry_.contract->name; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

 private:
  OpEntry const& entry_;
  nvinfer1::PluginFieldCollection collection_;
};

}  // namespace ringplugins
