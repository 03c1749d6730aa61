// A TensorRT target of a ringexport bundle, loaded and run without Python: engine, plugins, decode state.
// Compile it against the headers of the TensorRT that will load it (TensorRT or TensorRT-RTX).
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace ring {

// Memory on the GPU, zeroed when it is made.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer const&) = delete;
  DeviceBuffer& operator=(DeviceBuffer const&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Everything that the model remembers of a batch of sequences. Make one per batch; states are independent.
// Per linear layer it holds one fp32 matrix a head, whose size does not depend on the context; per softmax layer a
// key and a value cache of `capacity` tokens. Copy the buffers to fork or to save a state.
struct State {
  int32_t rows = 0;
  int64_t capacity = 0;
  std::vector<int32_t> position;  // tokens that each row has seen
  std::map<std::string, std::unique_ptr<DeviceBuffer>> tensors;  // by the name of the input, such as past_state.3
};

class Engine {
 public:
  // directory: targets/<target> of a bundle. runtime_library: libnvinfer.so.10 or libtensorrt_rtx.so.1.
  // Throws std::runtime_error with one sentence that says what is wrong.
  Engine(std::string const& directory, std::string const& runtime_library);
  ~Engine();
  Engine(Engine const&) = delete;
  Engine& operator=(Engine const&) = delete;

  State new_state(int32_t rows, int64_t capacity) const;

  // Feeds `tokens` [rows][any length], right padded by the engine; returns the logits [rows * vocabulary] after the
  // last token of each row. One token per row runs in the decode profile, more in the prefill profile.
  std::vector<float> feed(std::vector<std::vector<int64_t>> const& tokens, State& state);

  int64_t vocabulary() const { return vocabulary_; }

 private:
  void bind_state(nvinfer1::IExecutionContext& context, State const& state) const;

  class Log;
  std::unique_ptr<Log> log_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // by profile: decode, prefill
  cudaStream_t stream_ = nullptr;
  int64_t vocabulary_ = 0;
};

}  // namespace ring
