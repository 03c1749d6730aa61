// Drives one plugin through TensorRT's own interface, without TensorRT: creator -> build capability -> formats ->
// shapes -> clone -> serialized fields -> runtime capability -> enqueue. tests/plugins/test_driver.py writes the case
// file, compares the outputs with the op contract, and reads what is printed. Lines of a case file:
//
//   library PATH                      the plugin library
//   op NAME
//   attribute NAME int|real VALUE     as often as needed
//   length NAME NUMBER                pretend that this attribute has so many values
//   input NAME DTYPE D0,D1,.. FILE    raw bytes, in order
//   output NAME DTYPE D0,D1,.. FILE   what is expected, and where the bytes go
//   profile NAME D0,D1,..             largest shape of this tensor in the profile that the workspace is asked for
//   separate                          outputs never share the buffer of an input
//   enqueue                           run on the GPU; without this line nothing of CUDA is called
//   abi NUMBER                        pretend that the serialized fields have this ABI
//
// Exit codes: 0 done, 2 bad case file, 3 the plugin refused or broke its promise (the last line says where).
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;  // the whole file is about its interface

namespace {

constexpr size_t kGuardBytes = 256;
constexpr int kSentinel = 0xA5;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void expect(bool condition, std::string const& what) {
  if (!condition) {
    throw Failure(what);
  }
}

void cuda(cudaError_t error, char const* what) {
  expect(error == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

class PrintingLogger : public ILogger {
 public:
  void log(Severity, AsciiChar const* message) noexcept override { std::cout << "log: " << message << "\n"; }
};

class Finder : public ILoggerFinder {
 public:
  ILogger* findLogger() override { return &logger_; }

 private:
  PrintingLogger logger_;
};

// Dimension expressions: constants, and dimensions that the plugin is not told the value of.
class Expression : public IDimensionExpr, public apiv::VDimensionExpr {
 public:
  Expression(int64_t value, bool constant) : value(value), constant_(constant) { mImpl = this; }
  bool isConstant() const override { return constant_; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }

  int64_t const value;

 private:
  bool constant_;
};

class Expressions : public IExprBuilder, public apiv::VExprBuilder {
 public:
  Expressions() { mImpl = this; }
  IDimensionExpr const* make(int64_t value, bool constant) {
    owned_.push_back(std::make_unique<Expression>(value, constant));
    return owned_.back().get();
  }
  IDimensionExpr const* constant(int64_t value) override { return make(value, true); }
  IDimensionExpr const* operation(DimensionOperation, IDimensionExpr const&, IDimensionExpr const&) override {
    throw Failure("the plugin computes with dimensions, which this driver does not");
  }
  IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }

 private:
  std::vector<std::unique_ptr<Expression>> owned_;
};

struct TensorCase {
  std::string name;
  DataType type;
  Dims dims{};
  Dims largest{};
  std::string file;

  size_t bytes() const {
    size_t count = type == DataType::kFLOAT || type == DataType::kINT32 ? 4
                   : type == DataType::kBF16 || type == DataType::kHALF ? 2
                                                                        : 1;
    for (int32_t i = 0; i < dims.nbDims; ++i) {
      count *= static_cast<size_t>(dims.d[i]);
    }
    return count;
  }
  PluginTensorDesc desc() const { return {dims, type, TensorFormat::kLINEAR, 1.0F}; }
  DynamicPluginTensorDesc dynamic_desc() const {
    DynamicPluginTensorDesc result{desc(), dims, largest, dims};
    return result;
  }
};

struct Case {
  std::string library;
  std::string op;
  std::map<std::string, int32_t> integers;
  std::map<std::string, float> reals;
  std::vector<std::string> attribute_order;
  std::map<std::string, int32_t> lengths;  // of attributes, where it is not 1
  std::vector<TensorCase> inputs;
  std::vector<TensorCase> outputs;
  bool separate = false;
  bool enqueue = false;
  int32_t abi = 0;

  TensorCase& tensor(std::string const& name) {
    for (auto* list : {&inputs, &outputs}) {
      for (auto& found : *list) {
        if (found.name == name) {
          return found;
        }
      }
    }
    throw std::runtime_error("no tensor " + name);
  }
};

DataType type_of(std::string const& name) {
  static std::map<std::string, DataType> const kTypes = {
      {"fp32", DataType::kFLOAT}, {"fp16", DataType::kHALF},    {"bf16", DataType::kBF16},   {"int8", DataType::kINT8},
      {"int32", DataType::kINT32}, {"fp8_e4m3", DataType::kFP8}, {"int64", DataType::kINT64}};
  return kTypes.at(name);
}

Dims read_shape(std::string const& text) {
  Dims dims{};
  std::istringstream sizes(text);
  for (std::string part; std::getline(sizes, part, ',');) {
    dims.d[dims.nbDims++] = std::stoll(part);
  }
  return dims;
}

TensorCase read_tensor(std::istringstream& line) {
  std::string type;
  std::string shape;
  TensorCase tensor{};
  line >> tensor.name >> type >> shape >> tensor.file;
  tensor.type = type_of(type);
  tensor.dims = tensor.largest = read_shape(shape);
  return tensor;
}

Case read_case(char const* path) {
  Case result;
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    std::istringstream line(text);
    std::string kind;
    std::string name;
    line >> kind;
    if (kind == "library") {
      line >> result.library;
    } else if (kind == "op") {
      line >> result.op;
    } else if (kind == "attribute") {
      std::string type;
      line >> name >> type;
      result.attribute_order.push_back(name);
      if (type == "int") {
        line >> result.integers[name];
      } else {
        line >> result.reals[name];
      }
    } else if (kind == "length") {
      line >> name;
      line >> result.lengths[name];
    } else if (kind == "input") {
      result.inputs.push_back(read_tensor(line));
    } else if (kind == "output") {
      result.outputs.push_back(read_tensor(line));
    } else if (kind == "profile") {
      std::string shape;
      line >> name >> shape;
      result.tensor(name).largest = read_shape(shape);
    } else if (kind == "separate") {
      result.separate = true;
    } else if (kind == "enqueue") {
      result.enqueue = true;
    } else if (kind == "abi") {
      line >> result.abi;
    } else if (!kind.empty()) {
      throw std::runtime_error("unknown line: " + text);
    }
  }
  return result;
}

// Device memory with sentinel bytes around it.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    cuda(cudaMalloc(&base_, bytes + 2 * kGuardBytes), "cudaMalloc");
    cuda(cudaMemset(base_, kSentinel, bytes + 2 * kGuardBytes), "cudaMemset");
  }
  ~Guarded() { cudaFree(base_); }
  Guarded(Guarded const&) = delete;
  Guarded& operator=(Guarded const&) = delete;

  char* data() const { return static_cast<char*>(base_) + kGuardBytes; }

  void check(std::string const& name) const {
    std::vector<unsigned char> found(kGuardBytes);
    for (char* edge : {static_cast<char*>(base_), data() + bytes_}) {
      cuda(cudaMemcpy(found.data(), edge, kGuardBytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
      for (unsigned char byte : found) {
        expect(byte == kSentinel, "bytes outside of " + name + " were written");
      }
    }
  }
  void read_from(std::string const& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> host(bytes_);
    file.read(host.data(), static_cast<std::streamsize>(bytes_));
    expect(static_cast<bool>(file) || bytes_ == 0, "cannot read " + path);
    cuda(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  void write_to(std::string const& path) const {
    std::vector<char> host(bytes_);
    cuda(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    std::ofstream(path, std::ios::binary).write(host.data(), static_cast<std::streamsize>(bytes_));
  }

 private:
  void* base_ = nullptr;
  size_t bytes_;
};

IPluginCreatorV3One* find_creator(void* library, std::string const& op) {
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  auto* get = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
  auto* set = reinterpret_cast<SetLoggerFinder>(dlsym(library, "setLoggerFinder"));
  expect(get != nullptr && set != nullptr, "the library does not export getCreators and setLoggerFinder");
  static Finder finder;
  set(&finder);
  int32_t count = 0;
  auto* const* creators = get(count);
  for (int32_t i = 0; i < count; ++i) {
    auto const info = creators[i]->getInterfaceInfo();
    expect(std::string(info.kind) == "PLUGIN CREATOR_V3ONE" && info.major == 1, "a creator of another kind");
    auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
    if (op == creator->getPluginName()) {
      expect(std::string(creator->getPluginNamespace()) == "ringexport", "a plugin of another namespace");
      return creator;
    }
  }
  throw Failure("no creator for " + op);
}

// As TensorRT keeps them between serialization and deserialization: copies with another lifetime.
struct FieldCopies {
  std::vector<std::string> names;
  std::vector<std::vector<char>> data;
  std::vector<PluginField> fields;
  PluginFieldCollection collection;

  FieldCopies(PluginFieldCollection const& from, int32_t abi) {
    for (int32_t i = 0; i < from.nbFields; ++i) {
      auto const& field = from.fields[i];
      expect(field.type == PluginFieldType::kINT32 || field.type == PluginFieldType::kFLOAT32, "a field of odd type");
      auto const* bytes = static_cast<char const*>(field.data);
      names.emplace_back(field.name);
      data.emplace_back(bytes, bytes + 4 * field.length);
      if (abi != 0 && names.back() == "ring_abi") {
        std::memcpy(data.back().data(), &abi, sizeof(abi));
      }
    }
    for (size_t i = 0; i < names.size(); ++i) {
      fields.emplace_back(names[i].c_str(), data[i].data(), from.fields[i].type, from.fields[i].length);
    }
    collection = {static_cast<int32_t>(fields.size()), fields.data()};
  }
  bool operator==(FieldCopies const& other) const { return names == other.names && data == other.data; }
};

template <typename T>
T* capability(IPluginV3& plugin, PluginCapabilityType type, char const* kind) {
  auto* found = plugin.getCapabilityInterface(type);
  expect(found != nullptr, std::string("no capability ") + kind);
  expect(std::string(found->getInterfaceInfo().kind) == kind, std::string("a capability that is no ") + kind);
  return static_cast<T*>(found);
}

struct Descriptions {
  std::vector<DynamicPluginTensorDesc> all;
  std::vector<PluginTensorDesc> inputs;
  std::vector<PluginTensorDesc> outputs;

  explicit Descriptions(Case const& given) {
    for (auto const& tensor : given.inputs) {
      all.push_back(tensor.dynamic_desc());
      inputs.push_back(tensor.desc());
    }
    for (auto const& tensor : given.outputs) {
      all.push_back(tensor.dynamic_desc());
      outputs.push_back(tensor.desc());
    }
  }
};

void check_types_and_shapes(Case const& given, IPluginV3OneBuild& build) {
  auto const num_inputs = static_cast<int32_t>(given.inputs.size());
  auto const num_outputs = static_cast<int32_t>(given.outputs.size());
  expect(build.getNbOutputs() == num_outputs, "getNbOutputs differs");
  std::vector<DataType> types;
  for (auto const& tensor : given.inputs) {
    types.push_back(tensor.type);
  }
  std::vector<DataType> made(given.outputs.size());
  expect(build.getOutputDataTypes(made.data(), num_outputs, types.data(), num_inputs) == 0, "getOutputDataTypes");
  for (size_t i = 0; i < made.size(); ++i) {
    expect(made[i] == given.outputs[i].type, "the type of " + given.outputs[i].name + " differs");
  }
  for (bool known : {true, false}) {  // static shapes, and shapes whose first dimension varies
    Expressions expressions;
    std::vector<DimsExprs> shapes(given.inputs.size());
    for (size_t i = 0; i < shapes.size(); ++i) {
      auto const& dims = given.inputs[i].dims;
      shapes[i].nbDims = dims.nbDims;
      for (int32_t j = 0; j < dims.nbDims; ++j) {
        shapes[i].d[j] = expressions.make(dims.d[j], known || j > 0);
      }
    }
    std::vector<DimsExprs> found(given.outputs.size());
    expect(build.getOutputShapes(shapes.data(), num_inputs, nullptr, 0, found.data(), num_outputs, expressions) == 0,
           "getOutputShapes");
    for (size_t i = 0; i < found.size(); ++i) {
      auto const& dims = given.outputs[i].dims;
      expect(found[i].nbDims == dims.nbDims, "the rank of " + given.outputs[i].name + " differs");
      for (int32_t j = 0; j < dims.nbDims; ++j) {
        expect(static_cast<Expression const*>(found[i].d[j])->value == dims.d[j],
               "a dimension of " + given.outputs[i].name + " differs");
      }
    }
  }
}

void check_formats(Case const& given, Descriptions const& descs, IPluginV3OneBuild& build) {
  auto const num_inputs = static_cast<int32_t>(given.inputs.size());
  auto const num_outputs = static_cast<int32_t>(given.outputs.size());
  for (int32_t pos = 0; pos < num_inputs + num_outputs; ++pos) {
    auto all = descs.all;
    expect(build.supportsFormatCombination(pos, all.data(), num_inputs, num_outputs), "a format is refused");
    all[pos].desc.format = TensorFormat::kCHW32;
    expect(!build.supportsFormatCombination(pos, all.data(), num_inputs, num_outputs), "a vectorized format is taken");
    all = descs.all;
    all[pos].desc.type = DataType::kBOOL;
    expect(!build.supportsFormatCombination(pos, all.data(), num_inputs, num_outputs), "a wrong type is taken");
  }
  expect(build.configurePlugin(descs.all.data(), num_inputs, descs.all.data() + num_inputs, num_outputs) == 0,
         "configurePlugin");
}

void enqueue(Case const& given, Descriptions const& descs, std::vector<int32_t> const& aliases, size_t workspace_bytes,
             IPluginV3OneRuntime& runtime) {
  std::vector<std::unique_ptr<Guarded>> buffers;
  std::vector<void const*> inputs;
  std::vector<void*> outputs;
  for (auto const& tensor : given.inputs) {
    buffers.push_back(std::make_unique<Guarded>(tensor.bytes()));
    buffers.back()->read_from(tensor.file);
    inputs.push_back(buffers.back()->data());
  }
  std::vector<Guarded*> results;
  for (size_t i = 0; i < given.outputs.size(); ++i) {
    if (aliases[i] >= 0 && !given.separate) {
      results.push_back(buffers[static_cast<size_t>(aliases[i])].get());
    } else {
      buffers.push_back(std::make_unique<Guarded>(given.outputs[i].bytes()));
      results.push_back(buffers.back().get());
    }
    outputs.push_back(results.back()->data());
  }
  Guarded workspace(workspace_bytes);  // holds sentinel bytes, as TensorRT's may hold anything
  cudaStream_t stream = nullptr;
  cuda(cudaStreamCreate(&stream), "cudaStreamCreate");
  expect(runtime.enqueue(descs.inputs.data(), descs.outputs.data(), inputs.data(), outputs.data(), workspace.data(),
                         stream) == 0,
         "enqueue");
  cuda(cudaStreamSynchronize(stream), "the kernels");
  cuda(cudaStreamDestroy(stream), "cudaStreamDestroy");
  workspace.check("the workspace");
  for (size_t i = 0; i < buffers.size(); ++i) {
    buffers[i]->check("tensor " + std::to_string(i));
  }
  for (size_t i = 0; i < results.size(); ++i) {
    results[i]->write_to(given.outputs[i].file);
  }
}

void drive(Case const& given) {
  void* library = dlopen(given.library.c_str(), RTLD_NOW | RTLD_LOCAL);
  expect(library != nullptr, std::string("dlopen: ") + (library == nullptr ? dlerror() : ""));
  auto* creator = find_creator(library, given.op);
  std::vector<PluginField> fields;
  for (auto const& name : given.attribute_order) {
    auto const integer = given.integers.find(name);
    auto const length = given.lengths.count(name) > 0 ? given.lengths.at(name) : 1;
    if (integer != given.integers.end()) {
      fields.emplace_back(name.c_str(), &integer->second, PluginFieldType::kINT32, length);
    } else {
      fields.emplace_back(name.c_str(), &given.reals.at(name), PluginFieldType::kFLOAT32, length);
    }
  }
  PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
  std::unique_ptr<IPluginV3> made(creator->createPlugin("case", &collection, TensorRTPhase::kBUILD));
  expect(made != nullptr, "createPlugin");

  auto* core = capability<IPluginV3OneCore>(*made, PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE");
  expect(given.op == core->getPluginName(), "getPluginName differs");
  auto* build = capability<IPluginV3OneBuildV2>(*made, PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD");
  expect(build->getInterfaceInfo().major == 2, "no build capability of version 2");
  Descriptions const descs(given);
  auto const num_inputs = static_cast<int32_t>(given.inputs.size());
  auto const num_outputs = static_cast<int32_t>(given.outputs.size());
  check_types_and_shapes(given, *build);
  check_formats(given, descs, *build);
  size_t const workspace_bytes =
      build->getWorkspaceSize(descs.all.data(), num_inputs, descs.all.data() + num_inputs, num_outputs);
  std::cout << "workspace_bytes: " << workspace_bytes << "\n";
  std::vector<int32_t> aliases;
  for (int32_t i = 0; i < num_outputs; ++i) {
    aliases.push_back(build->getAliasedInput(i));
    std::cout << "alias: " << given.outputs[static_cast<size_t>(i)].name << " " << aliases.back() << "\n";
  }

  std::unique_ptr<IPluginV3> copy(made->clone());
  expect(copy != nullptr, "clone");
  made.reset();  // the copy stands on its own
  auto* first = capability<IPluginV3OneRuntime>(*copy, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
  FieldCopies const serialized(*first->getFieldsToSerialize(), given.abi);
  copy.reset();
  std::unique_ptr<IPluginV3> loaded(creator->createPlugin("case", &serialized.collection, TensorRTPhase::kRUNTIME));
  expect(loaded != nullptr, "createPlugin from serialized fields");
  auto* second = capability<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
  expect(FieldCopies(*second->getFieldsToSerialize(), 0) == serialized, "serialized fields change in a round trip");

  std::unique_ptr<IPluginV3> attached(second->attachToContext(nullptr));
  expect(attached != nullptr, "attachToContext");
  auto* runtime = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME, "PLUGIN_V3ONE_RUNTIME");
  expect(runtime->setTactic(0) == 0, "setTactic");
  expect(runtime->onShapeChange(descs.inputs.data(), num_inputs, descs.outputs.data(), num_outputs) == 0,
         "onShapeChange");
  if (given.enqueue) {
    enqueue(given, descs, aliases, workspace_bytes, *runtime);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: plugin_driver CASE...\n";
    return 2;
  }
  for (int i = 1; i < argc; ++i) {
    try {
      drive(read_case(argv[i]));
      std::cout << "done: " << argv[i] << std::endl;
    } catch (Failure const& failure) {
      std::cout << "refused: " << failure.what() << std::endl;
      return 3;
    } catch (std::exception const& error) {
      std::cout << "bad case: " << error.what() << std::endl;
      return 2;
    }
  }
  return 0;
}
