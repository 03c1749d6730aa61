// Attributes of an op: a plain struct, a table of its members, and careful conversion from and to plugin fields.
//
//   struct Attributes {
//     int32_t num_heads;
//     float query_scale;
//     static constexpr auto fields() {
//       return std::make_tuple(field("num_heads", &Attributes::num_heads), field("query_scale", &...));
//     }
//   };
//
// The plugin field type, and the values that are taken, follow from the type of the member: a type without an entry
// below does not compile.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "contract.h"
#include "error.h"

namespace ringplugins {

enum class Flag : int32_t { kOff, kOn };

template <typename T>
struct FieldTypeOf;
template <>
struct FieldTypeOf<int32_t> {
  static constexpr auto kType = nvinfer1::PluginFieldType::kINT32;
  static constexpr bool kReal = false;
  static constexpr char const* kExpected = "1 or more";
  static bool takes(int32_t value) { return value >= 1; }
};
template <>
struct FieldTypeOf<Flag> {
  static constexpr auto kType = nvinfer1::PluginFieldType::kINT32;
  static constexpr bool kReal = false;
  static constexpr char const* kExpected = "0 or 1";
  static bool takes(Flag value) { return value == Flag::kOff || value == Flag::kOn; }
};
template <>
struct FieldTypeOf<float> {
  static constexpr auto kType = nvinfer1::PluginFieldType::kFLOAT32;
  static constexpr bool kReal = true;
  static constexpr char const* kExpected = "a positive number";
  static bool takes(float value) { return std::isfinite(value) && value > 0; }
};

template <typename Struct, typename T>
struct Field {
  char const* name;
  T Struct::*member;
};

template <typename Struct, typename T>
constexpr Field<Struct, T> field(char const* name, T Struct::*member) {
  return {name, member};
}

constexpr bool same_text(char const* a, char const* b) {
  for (; *a == *b; ++a, ++b) {
    if (*a == '\0') {
      return true;
    }
  }
  return false;
}

// Whether a struct has exactly the attributes of the contract, in order and with the same types: for static_assert.
template <typename Struct>
constexpr bool fits_contract(OpContract const& contract) {
  int32_t index = 0;
  bool same = true;
  auto check = [&](auto const& entry) {
    using Member = std::remove_reference_t<decltype(std::declval<Struct>().*(entry.member))>;
    same = same && index < contract.num_attributes && same_text(entry.name, contract.attributes[index].name) &&
           FieldTypeOf<Member>::kReal == contract.attributes[index].is_real;
    ++index;
  };
  std::apply([&](auto const&... entries) { (check(entries), ...); }, Struct::fields());
  return same && index == contract.num_attributes;
}

// The version of the serialized form: raised whenever an op's attributes, inputs or layout of weights change.
#define RINGPLUGINS_ABI 2
inline constexpr int32_t kAbiVersion = RINGPLUGINS_ABI;
inline constexpr char const* kAbiField = "ring_abi";

// The plugin fields of one struct. Pointers lead into the struct, so the struct has to outlive them.
template <typename Struct>
std::vector<nvinfer1::PluginField> serialized_fields(Struct const& values) {
  std::vector<nvinfer1::PluginField> fields;
  std::apply(
      [&](auto const&... entries) {
        (fields.emplace_back(entries.name, &(values.*(entries.member)),
                             FieldTypeOf<std::decay_t<decltype(values.*(entries.member))>>::kType, 1),
         ...);
      },
      Struct::fields());
  fields.emplace_back(kAbiField, &kAbiVersion, nvinfer1::PluginFieldType::kINT32, 1);
  return fields;
}

inline char const* field_type_name(nvinfer1::PluginFieldType type) {
  static constexpr std::array<char const*, 14> kNames = {"float16", "float32", "float64", "int8",  "int16",
                                                         "int32",   "char",    "dims",    "unknown", "bf16",
                                                         "int64",   "fp8",     "int4",    "fp4"};
  auto const index = static_cast<size_t>(type);
  return index < kNames.size() ? kNames[index] : "of an unknown type";
}

template <typename T>
void read_field(char const* op, nvinfer1::PluginField const& found, T& target) {
  if (found.type != FieldTypeOf<T>::kType || found.length != 1 || found.data == nullptr) {
    throw PluginError(std::string(op) + ": attribute " + found.name + " is " + field_type_name(found.type) + " x " +
                      std::to_string(found.length) + ", expected one " + field_type_name(FieldTypeOf<T>::kType));
  }
  std::memcpy(&target, found.data, sizeof(T));
}

inline nvinfer1::PluginField const* find_field(nvinfer1::PluginFieldCollection const& given, char const* name) {
  for (int32_t i = 0; i < given.nbFields; ++i) {
    if (given.fields[i].name != nullptr && std::strcmp(given.fields[i].name, name) == 0) {
      return &given.fields[i];
    }
  }
  return nullptr;
}

template <typename Struct>
bool is_known_field(char const* name) {
  bool known = std::strcmp(name, kAbiField) == 0;
  std::apply([&](auto const&... entries) { ((known = known || std::strcmp(name, entries.name) == 0), ...); },
             Struct::fields());
  return known;
}

template <typename T>
void check_value(char const* op, char const* name, T value) {
  using Number = std::conditional_t<FieldTypeOf<T>::kReal, float, int32_t>;
  if (!FieldTypeOf<T>::takes(value)) {
    throw PluginError(std::string(op) + ": attribute " + name + " is " + std::to_string(static_cast<Number>(value)) +
                      ", expected " + FieldTypeOf<T>::kExpected);
  }
}

// Reads all attributes. Missing, unknown and mistyped ones are refused, values out of range too, and fields that a
// library with another ABI has serialized.
template <typename Struct>
Struct parse_fields(char const* op, nvinfer1::PluginFieldCollection const& given, bool is_serialized) {
  for (int32_t i = 0; i < given.nbFields; ++i) {
    char const* name = given.fields[i].name != nullptr ? given.fields[i].name : "";
    if (!is_known_field<Struct>(name)) {
      throw PluginError(std::string(op) + ": attribute '" + name + "' is not known");
    }
  }
  if (is_serialized) {
    int32_t abi = 0;
    if (auto const* found = find_field(given, kAbiField)) {
      read_field(op, *found, abi);
    }
    if (abi != kAbiVersion) {
      throw PluginError(std::string(op) + ": the engine was built with version " + std::to_string(abi) +
                        " of the plugins, this library has version " + std::to_string(kAbiVersion) +
                        ": use the library that lies beside the engine");
    }
  }
  Struct values{};
  auto read = [&](auto const& entry) {
    auto const* found = find_field(given, entry.name);
    if (found == nullptr) {
      throw PluginError(std::string(op) + ": attribute " + entry.name + " is missing");
    }
    read_field(op, *found, values.*(entry.member));
    check_value(op, entry.name, values.*(entry.member));
  };
  std::apply([&](auto const&... entries) { (read(entries), ...); }, Struct::fields());
  return values;
}

}  // namespace ringplugins
