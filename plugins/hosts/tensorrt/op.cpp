#include "op.h"

namespace ringplugins {

void require(OpContract const& contract, bool fits, char const* attribute, int32_t value, char const* expected,
             int32_t of) {
  if (!fits) {
    throw PluginError(std::string(contract.name) + ": attribute " + attribute + " is " + std::to_string(value) +
                      ", expected " + expected + ", " + std::to_string(of));
  }
}

void check(OpContract const& contract, ringkernels::Status const& status) {
  if (!status.ok()) {
    throw PluginError(std::string(contract.name) + ": the kernel refuses " + status.field + " = " +
                      std::to_string(status.got) + ", expected " + status.expected);
  }
}

void check_cuda(OpContract const& contract, char const* what, cudaError_t error) {
  if (error != cudaSuccess) {
    throw PluginError(std::string(contract.name) + ": cannot " + what + ": " + cudaGetErrorString(error));
  }
}

void clear(OpContract const& contract, void* workspace, size_t bytes, cudaStream_t stream) {
  if (bytes > 0) {
    check_cuda(contract, "clear the workspace", cudaMemsetAsync(workspace, 0, bytes, stream));
  }
}

void carry_over(OpContract const& contract, Call const& call, int32_t output, size_t bytes, cudaStream_t stream) {
  auto const& target = call.outputs[static_cast<size_t>(output)];
  auto const& source = call.inputs[static_cast<size_t>(contract.outputs[output].alias)];
  if (target.data != source.data) {
    check_cuda(contract, "copy the state",
               cudaMemcpyAsync(target.data, source.data, bytes, cudaMemcpyDeviceToDevice, stream));
  }
}

}  // namespace ringplugins
