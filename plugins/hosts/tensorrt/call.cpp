#include "call.h"

#include <limits>

namespace ringplugins {

namespace {

std::string describe(Sizes const& sizes, TensorRule const& rule) {
  std::string text;
  for (int32_t i = 0; i < rule.rank; ++i) {
    for (Size name : {rule.dims[i].first, rule.dims[i].second}) {
      if (name != Size::kNone && name != Size::kLeading && sizes[name] != kUnknown) {
        std::string part = std::string(kSizeNames[static_cast<size_t>(name)]) + "=" + std::to_string(sizes[name]);
        if (text.find(part) == std::string::npos) {
          text += (text.empty() ? " with " : ", ") + part;
        }
      }
    }
  }
  return text;
}

[[noreturn]] void refuse(OpContract const& contract, TensorRule const& rule, nvinfer1::Dims const& dims,
                         Sizes const& sizes) {
  throw PluginError(std::string(contract.name) + ": " + rule.name + " has shape " + to_text(dims) + ", expected [" +
                    rule.shape + "]" + describe(sizes, rule));
}

// Learns the one unknown dimension of a rule, or compares. False if it does not fit.
bool bind(DimRule const& rule, int64_t extent, Sizes& sizes) {
  int64_t known = rule.factor;
  Size missing = Size::kNone;
  int32_t unknown = 0;
  for (Size name : {rule.first, rule.second}) {
    if (name == Size::kNone) {
      continue;
    }
    if (sizes[name] == kUnknown) {
      missing = name;
      ++unknown;
    } else {
      known *= sizes[name];
    }
  }
  if (unknown == 0) {
    return known == extent;
  }
  if (unknown > 1) {
    return true;
  }
  if (known <= 0 || extent % known != 0) {
    return extent == 0;
  }
  sizes.set(missing, extent / known);
  return true;
}

}  // namespace

int64_t Sizes::value(DimRule const& rule) const {
  int64_t result = rule.factor;
  for (Size name : {rule.first, rule.second}) {
    if (name == Size::kNone) {
      continue;
    }
    if ((*this)[name] == kUnknown) {
      return kUnknown;
    }
    result *= (*this)[name];
  }
  return result;
}

void match(OpContract const& contract, TensorRule const& rule, nvinfer1::Dims const& dims, Sizes& sizes) {
  bool const leading = rule.rank > 0 && rule.dims[0].first == Size::kLeading;
  int32_t const fixed = leading ? rule.rank - 1 : rule.rank;
  if (leading ? dims.nbDims < fixed + 1 : dims.nbDims != fixed) {
    refuse(contract, rule, dims, sizes);
  }
  int32_t const first = dims.nbDims - fixed;
  if (leading) {
    int64_t rows = 1;
    for (int32_t i = 0; i < first; ++i) {
      rows = dims.d[i] < 0 ? kUnknown : (rows == kUnknown ? kUnknown : rows * dims.d[i]);
    }
    if (rows != kUnknown && !bind({Size::kLeading}, rows, sizes)) {
      refuse(contract, rule, dims, sizes);
    }
  }
  for (int32_t i = 0; i < fixed; ++i) {
    int64_t const extent = dims.d[first + i];
    if (extent >= 0 && !bind(rule.dims[leading ? i + 1 : i], extent, sizes)) {
      refuse(contract, rule, dims, sizes);
    }
  }
}

int32_t Call::size32(Size name) const {
  int64_t const value = sizes[name];
  if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
    throw PluginError(std::string("the dimension ") + kSizeNames[static_cast<size_t>(name)] + " is " +
                      std::to_string(value) + ", which is out of range");
  }
  return static_cast<int32_t>(value);
}

std::string to_text(nvinfer1::Dims const& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i > 0 ? " " : "") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

char const* type_name(nvinfer1::DataType type) {
  using nvinfer1::DataType;
  switch (type) {
    case DataType::kFLOAT: return "fp32";
    case DataType::kHALF: return "fp16";
    case DataType::kBF16: return "bf16";
    case DataType::kINT8: return "int8";
    case DataType::kFP8: return "fp8_e4m3";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    default: return "another type";
  }
}

ringkernels::DType kernel_type(nvinfer1::DataType type) {
  using nvinfer1::DataType;
  switch (type) {
    case DataType::kFLOAT: return ringkernels::DType::kFloat32;
    case DataType::kHALF: return ringkernels::DType::kFloat16;
    case DataType::kBF16: return ringkernels::DType::kBFloat16;
    case DataType::kINT8: return ringkernels::DType::kInt8;
    case DataType::kFP8: return ringkernels::DType::kFp8E4M3;
    default: throw PluginError(std::string("no kernel takes tensors of ") + type_name(type));
  }
}

size_t element_bytes(nvinfer1::DataType type) {
  using nvinfer1::DataType;
  switch (type) {
    case DataType::kINT64: return 8;
    case DataType::kFLOAT:
    case DataType::kINT32: return 4;
    case DataType::kHALF:
    case DataType::kBF16: return 2;
    default: return 1;
  }
}

}  // namespace ringplugins
