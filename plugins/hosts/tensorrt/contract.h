// The contract of an op as data: what the plugin border checks and derives its shapes from.
// op_contract.h, generated from ringexport/ops, holds one table per op.
#pragma once

#include <cstdint>

namespace ringplugins {

// Dimensions by name, as in docs/ops.md. kLeading stands for any number of dimensions in front.
enum class Size : int32_t { kNone, kB, kT, kS, kH, kKV, kK, kV, kN, kD, kE, kTopK, kI, kO, kLeading, kCount };

inline constexpr char const* kSizeNames[] = {"", "B", "T", "S", "H", "KV", "K", "V", "N", "D", "E", "k", "I", "O",
                                             "..."};
static_assert(sizeof(kSizeNames) / sizeof(kSizeNames[0]) == static_cast<size_t>(Size::kCount));

// factor * first * second
struct DimRule {
  Size first = Size::kNone;
  Size second = Size::kNone;
  int32_t factor = 1;

  constexpr bool operator==(DimRule const& other) const {
    return first == other.first && second == other.second && factor == other.factor;
  }
};

enum class Element : int32_t {
  kFloat,  // the activation dtype: bf16 or fp16, one for all tensors of an op
  kFp32,
  kInt32,
  kCode,  // int8 or FP8-E4M3, one for all tensors of an op
};

inline constexpr int32_t kMaxRank = 4;
inline constexpr int32_t kMaxTensors = 8;
inline constexpr int32_t kMaxAttributes = 8;

struct TensorRule {
  char const* name = "";
  char const* shape = "";  // as in docs/ops.md, for messages
  Element element = Element::kFloat;
  int32_t rank = 0;
  DimRule dims[kMaxRank] = {};
  int32_t alias = -1;  // of an output: index of the input whose buffer it takes over
};

struct AttributeRule {
  char const* name = "";
  bool is_real = false;       // fp32; else int32
  Size size = Size::kNone;    // the dimension that it gives
};

struct OpContract {
  char const* name = "";
  int32_t num_inputs = 0;
  TensorRule inputs[kMaxTensors] = {};
  int32_t num_outputs = 0;
  TensorRule outputs[kMaxTensors] = {};
  int32_t num_attributes = 0;
  AttributeRule attributes[kMaxAttributes] = {};
};

}  // namespace ringplugins
