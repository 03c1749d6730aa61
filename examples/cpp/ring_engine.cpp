#include "ring_engine.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>

namespace ring {

namespace {

constexpr int32_t kMajor = 10000;  // a version is major * 10000 + minor * 100 + patch
constexpr int32_t kDecode = 0;
constexpr int32_t kPrefill = 1;
constexpr int64_t kMinPrefillTokens = 2;  // of the shipped profile

void check(cudaError_t error, char const* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

std::vector<char> read_file(std::string const& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  auto const size = std::filesystem::is_regular_file(path) ? static_cast<std::streamoff>(file.tellg()) : -1;
  std::vector<char> bytes(static_cast<size_t>(std::max<std::streamoff>(size, 0)));
  file.seekg(0);
  if (size < 0 || !file.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    throw std::runtime_error("cannot read " + path);
  }
  return bytes;
}

template <typename Function>
Function find(void* library, char const* name) {
  auto* symbol = dlsym(library, name);
  if (symbol == nullptr) {
    throw std::runtime_error(std::string("the TensorRT library has no ") + name);
  }
  return reinterpret_cast<Function>(symbol);
}

void set_shape(nvinfer1::IExecutionContext& context, char const* name, nvinfer1::Dims const& shape) {
  if (context.setInputShape(name, shape)) {
    return;
  }
  std::string text;
  for (int32_t axis = 0; axis < shape.nbDims; ++axis) {
    text += (axis > 0 ? " " : "") + std::to_string(shape.d[axis]);
  }
  throw std::runtime_error(std::string(name) + " of shape [" + text + "] is outside of the engine's profile, whose " +
                           "limits are in manifest.json");
}

bool starts_with(std::string const& text, char const* start) { return text.rfind(start, 0) == 0; }

size_t element_bytes(nvinfer1::DataType type) { return type == nvinfer1::DataType::kFLOAT ? 4 : 2; }

}  // namespace

class Engine::Log final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, char const* message) noexcept override {
    if (severity <= Severity::kERROR) {
      std::cerr << message << "\n";
    }
  }
};

DeviceBuffer::DeviceBuffer(size_t bytes) : bytes_(bytes) {
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), "cudaMalloc");
  check(cudaMemset(data_, 0, bytes), "cudaMemset");
}

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

Engine::Engine(std::string const& directory, std::string const& runtime_library) : log_(std::make_unique<Log>()) {
  // Looked up while the program runs, so that one binary needs no TensorRT to be built, and reports a missing one.
  void* library = dlopen(runtime_library.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    throw std::runtime_error(std::string("cannot load TensorRT: ") + dlerror());
  }
  // Interfaces of TensorRT and TensorRT-RTX, and of their major versions, differ.
  int32_t const version = find<int32_t (*)()>(library, "getInferLibVersion")();
  if (version / kMajor != NV_TENSORRT_VERSION / kMajor) {
    throw std::runtime_error("this program was compiled with headers of version " +
                             std::to_string(NV_TENSORRT_VERSION) + ", and " + runtime_library + " is version " +
                             std::to_string(version) + ": compile it with the headers of that library");
  }
  using CreateRuntime = void* (*)(void*, int32_t);
  using GetRegistry = nvinfer1::IPluginRegistry* (*)();
  auto* registry = find<GetRegistry>(library, "getPluginRegistry")();
  // The plugins come from the bundle: engine and library were built for each other.
  if (registry->loadLibrary((directory + "/libringplugins.so").c_str()) == nullptr) {
    throw std::runtime_error("cannot load " + directory + "/libringplugins.so");
  }
  auto create = find<CreateRuntime>(library, "createInferRuntime_INTERNAL");
  runtime_.reset(static_cast<nvinfer1::IRuntime*>(create(log_.get(), NV_TENSORRT_VERSION)));
  auto const plan = read_file(directory + "/engine.plan");
  if (runtime_) {
    runtime_->setEngineHostCodeAllowed(true);  // a version-compatible engine brings a runtime along
  }
  engine_.reset(runtime_ ? runtime_->deserializeCudaEngine(plan.data(), plan.size()) : nullptr);
  if (!engine_) {
    throw std::runtime_error("TensorRT cannot load " + directory +
                             "/engine.plan: it is of another version, for another GPU, or cut off");
  }
  check(cudaStreamCreate(&stream_), "cudaStreamCreate");
  for (int32_t profile : {kDecode, kPrefill}) {
    contexts_.emplace_back(engine_->createExecutionContext());
    if (!contexts_.back() || !contexts_.back()->setOptimizationProfileAsync(profile, stream_)) {
      throw std::runtime_error("the engine has no profile " + std::to_string(profile));
    }
  }
  check(cudaStreamSynchronize(stream_), "setting the profiles");
  auto const logits = engine_->getTensorShape("logits");
  vocabulary_ = logits.d[logits.nbDims - 1];
}

Engine::~Engine() {
  contexts_.clear();
  engine_.reset();
  runtime_.reset();
  if (stream_ != nullptr) {
    cudaStreamDestroy(stream_);
  }
}

State Engine::new_state(int32_t rows, int64_t capacity) const {
  State state;
  state.rows = rows;
  state.capacity = capacity;
  state.position.assign(static_cast<size_t>(rows), 0);
  for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
    std::string const name = engine_->getIOTensorName(i);
    if (!starts_with(name, "past_")) {
      continue;
    }
    auto const shape = engine_->getTensorShape(name.c_str());  // [B, H, K, V] or [B, KV, S, K]; -1 varies
    size_t bytes = element_bytes(engine_->getTensorDataType(name.c_str())) * static_cast<size_t>(rows);
    for (int32_t axis = 1; axis < shape.nbDims; ++axis) {
      bytes *= static_cast<size_t>(shape.d[axis] < 0 ? capacity : shape.d[axis]);
    }
    state.tensors[name] = std::make_unique<DeviceBuffer>(bytes);
  }
  return state;
}

void Engine::bind_state(nvinfer1::IExecutionContext& context, State const& state) const {
  for (auto const& [name, buffer] : state.tensors) {
    auto shape = engine_->getTensorShape(name.c_str());
    shape.d[0] = state.rows;
    for (int32_t axis = 1; axis < shape.nbDims; ++axis) {
      shape.d[axis] = shape.d[axis] < 0 ? state.capacity : shape.d[axis];
    }
    // One buffer is input and output: the plugins update the state in place.
    std::string const present = "present_" + name.substr(std::string("past_").size());
    set_shape(context, name.c_str(), shape);
    context.setTensorAddress(name.c_str(), buffer->data());
    context.setTensorAddress(present.c_str(), buffer->data());
  }
}

std::vector<float> Engine::feed(std::vector<std::vector<int64_t>> const& tokens, State& state) {
  size_t const rows = tokens.size();
  int64_t width = 1;
  std::vector<int32_t> lengths;
  for (auto const& row : tokens) {
    lengths.push_back(static_cast<int32_t>(row.size()));
    width = std::max<int64_t>(width, static_cast<int64_t>(row.size()));
  }
  if (rows != static_cast<size_t>(state.rows) || *std::min_element(lengths.begin(), lengths.end()) < 1) {
    throw std::runtime_error("every row of the state needs at least one token");
  }
  bool const decode = width == 1;
  width = decode ? 1 : std::max(width, kMinPrefillTokens);
  std::vector<int64_t> ids(rows * static_cast<size_t>(width), 0);
  std::vector<int64_t> last;
  for (size_t row = 0; row < rows; ++row) {
    if (state.position[row] + lengths[row] > state.capacity) {
      throw std::runtime_error("the state is full: make it with a larger capacity");
    }
    for (int64_t const token : tokens[row]) {
      if (token < 0 || token >= vocabulary_) {
        throw std::runtime_error("token " + std::to_string(token) + " is not below " + std::to_string(vocabulary_));
      }
    }
    std::copy(tokens[row].begin(), tokens[row].end(), ids.begin() + static_cast<int64_t>(row) * width);
    last.push_back(lengths[row] - 1);
  }
  auto& context = *contexts_[decode ? kDecode : kPrefill];
  std::vector<std::unique_ptr<DeviceBuffer>> inputs;
  auto bind = [&](char const* name, void const* values, size_t bytes, std::vector<int64_t> const& shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    inputs.push_back(std::make_unique<DeviceBuffer>(bytes));
    check(cudaMemcpy(inputs.back()->data(), values, bytes, cudaMemcpyHostToDevice), name);
    set_shape(context, name, dims);
    context.setTensorAddress(name, inputs.back()->data());
  };
  auto const batch = static_cast<int64_t>(rows);
  bind("tokens", ids.data(), ids.size() * sizeof(int64_t), {batch, width});
  bind("lengths", lengths.data(), rows * sizeof(int32_t), {batch});
  bind("position", state.position.data(), rows * sizeof(int32_t), {batch});
  bind("logits_index", last.data(), rows * sizeof(int64_t), {batch, 1});
  DeviceBuffer logits(rows * static_cast<size_t>(vocabulary_) * sizeof(float));
  context.setTensorAddress("logits", logits.data());
  bind_state(context, state);
  if (!context.enqueueV3(stream_)) {
    throw std::runtime_error("the engine failed; the state is lost");
  }
  check(cudaStreamSynchronize(stream_), "the engine");
  for (size_t row = 0; row < rows; ++row) {
    state.position[row] += lengths[row];
  }
  std::vector<float> result(rows * static_cast<size_t>(vocabulary_));
  check(cudaMemcpy(result.data(), logits.data(), logits.bytes(), cudaMemcpyDeviceToHost), "logits");
  return result;
}

}  // namespace ring
