// The tensors of one call, checked against the contract and with every named dimension resolved.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <string>

#include "contract.h"
#include "error.h"
#include "ringkernels/types.h"

namespace ringplugins {

inline constexpr int64_t kUnknown = -1;

// Values of the named dimensions; kUnknown where nothing says.
class Sizes {
 public:
  Sizes() { values_.fill(kUnknown); }

  int64_t operator[](Size size) const { return values_[static_cast<size_t>(size)]; }
  void set(Size size, int64_t value) { values_[static_cast<size_t>(size)] = value; }

  // Value of a rule, kUnknown if a dimension in it is not known yet.
  int64_t value(DimRule const& rule) const;

 private:
  std::array<int64_t, static_cast<size_t>(Size::kCount)> values_;
};

// Matches one tensor and learns the dimensions that are new. Dimensions of -1 are not known and fit everything.
// Throws PluginError with the op, the tensor, its shape and what was expected.
void match(OpContract const& contract, TensorRule const& rule, nvinfer1::Dims const& dims, Sizes& sizes);

struct Tensor {
  nvinfer1::DataType type = nvinfer1::DataType::kFLOAT;
  void* data = nullptr;  // null while only sizes are asked for
};

// What an op gets: tensors in the order of the contract, and their dimensions.
struct Call {
  std::array<Tensor, kMaxTensors> inputs{};
  std::array<Tensor, kMaxTensors> outputs{};
  Sizes sizes;

  template <typename T>
  T const* input(int32_t index) const {
    return static_cast<T const*>(inputs[static_cast<size_t>(index)].data);
  }
  template <typename T>
  T* output(int32_t index) const {
    return static_cast<T*>(outputs[static_cast<size_t>(index)].data);
  }
  int64_t size(Size name) const { return sizes[name]; }
  // The same call with another value of one dimension.
  Call with(Size name, int64_t value) const {
    Call changed = *this;
    changed.sizes.set(name, value);
    return changed;
  }
  int32_t size32(Size name) const;
};

std::string to_text(nvinfer1::Dims const& dims);
char const* type_name(nvinfer1::DataType type);
ringkernels::DType kernel_type(nvinfer1::DataType type);
size_t element_bytes(nvinfer1::DataType type);

}  // namespace ringplugins
