// What differs between the plugins: their attributes, and how a call becomes launches of the kernel library.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "call.h"
#include "contract.h"
#include "fields.h"
#include "ringkernels/types.h"

namespace ringplugins {

class Op {
 public:
  virtual ~Op() = default;
  virtual std::unique_ptr<Op> clone() const = 0;
  // Throws for attributes that do not fit each other; each alone has been checked.
  virtual void check_attributes() const {}
  // Throws for types of inputs that fit the contract and not the attributes.
  virtual void check_types(nvinfer1::DataType const* /*inputs*/) const {}
  // Dimensions that the attributes give.
  virtual Sizes attribute_sizes() const = 0;
  virtual std::vector<nvinfer1::PluginField> fields() const = 0;
  // Bytes of scratch memory for a call of exactly these sizes.
  virtual size_t workspace_bytes(Call const& call) const = 0;
  // Bytes for every call of at most these sizes. A smaller call may need more than a larger one: few tokens are
  // spread over the GPU in other ways than many.
  virtual size_t reserved_bytes(Call const& largest) const = 0;
  // Launches the kernels; throws PluginError when they refuse.
  virtual void run(Call const& call, void* workspace, size_t workspace_bytes, cudaStream_t stream) const = 0;
};

// Attributes, their fields and copying, for ops of one attribute struct.
template <typename Derived, typename Attributes>
class OpWith : public Op {
 public:
  explicit OpWith(OpContract const& contract, Attributes const& attributes)
      : contract_(contract), attributes_(attributes) {}

  std::unique_ptr<Op> clone() const override {
    return std::make_unique<Derived>(static_cast<Derived const&>(*this));
  }
  std::vector<nvinfer1::PluginField> fields() const override { return serialized_fields(attributes_); }

  Sizes attribute_sizes() const override {
    Sizes sizes;
    int32_t index = 0;
    auto learn = [&](auto const& entry) {
      Size const name = contract_.attributes[index++].size;
      if (name != Size::kNone) {
        sizes.set(name, static_cast<int64_t>(attributes_.*(entry.member)));
      }
    };
    std::apply([&](auto const&... entries) { (learn(entries), ...); }, Attributes::fields());
    return sizes;
  }

 protected:
  OpContract const& contract_;
  Attributes attributes_;
};

// Throws with the op and the attribute if it does not fit another one, `of`.
void require(OpContract const& contract, bool fits, char const* attribute, int32_t value, char const* expected,
             int32_t of);

// Throws with the op and what the kernel says of its parameters.
void check(OpContract const& contract, ringkernels::Status const& status);
void check_cuda(OpContract const& contract, char const* what, cudaError_t error);

// The largest of need(count) for counts up to `most`: all of the small ones, where kernels change their ways, and
// enough of the others, where the need grows with the count.
template <typename Need>
size_t largest_need(int64_t most, Need&& need) {
  constexpr int64_t kAll = 1024;
  size_t largest = need(most);
  for (int64_t count = 1; count < most; count += count < kAll ? 1 : count / 8) {
    largest = std::max(largest, need(count));
  }
  return largest;
}

// A kernel's scratch memory has to be zero when it starts, and TensorRT's is shared by all layers.
void clear(OpContract const& contract, void* workspace, size_t bytes, cudaStream_t stream);

// TensorRT takes over the buffer of an aliased input; where it did not, the old content is copied first.
void carry_over(OpContract const& contract, Call const& call, int32_t output, size_t bytes, cudaStream_t stream);

using MakeOp = std::unique_ptr<Op> (*)(nvinfer1::PluginFieldCollection const& fields, bool is_serialized);

struct OpEntry {
  OpContract const* contract;
  MakeOp make;
  std::vector<nvinfer1::PluginField> declared;  // names and types for getFieldNames()
};

// Every op of the library.
std::vector<OpEntry> const& op_table();

}  // namespace ringplugins
