// What TensorRT looks up in the library; nothing else is exported (exports.map).
#include <NvInferVersion.h>

#include <vector>

#include "plugin.h"

#define RING_EXPORTED extern "C" __attribute__((visibility("default")))

RING_EXPORTED nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept try {
  struct Creators {
    std::vector<std::unique_ptr<ringplugins::Creator>> owned;
    std::vector<nvinfer1::IPluginCreatorInterface*> list;

    Creators() {
      for (auto const& entry : ringplugins::op_table()) {
        owned.push_back(std::make_unique<ringplugins::Creator>(entry));
        list.push_back(owned.back().get());
      }
    }
  };
  static Creators const creators;  // TensorRT keeps the pointers as long as the library is loaded
  count = static_cast<int32_t>(creators.list.size());
  return creators.list.data();
} catch (...) {  // no memory
  count = 0;
  return nullptr;
}

RING_EXPORTED void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  ringplugins::set_logger_finder(finder);
}

#ifndef RINGPLUGINS_VERSION
#error "RINGPLUGINS_VERSION is the version of ringexport"
#endif
#ifndef RINGPLUGINS_KERNELS
#error "RINGPLUGINS_KERNELS names the architectures that kernels are compiled for, or none"
#endif
#define RING_TEXT_OF(value) #value
#define RING_TEXT(value) RING_TEXT_OF(value)

// What ringexport reads from the file without loading it (ringexport/engine/plugins.py).
__attribute__((used)) static char const kIdentity[] =
    "@(#)ringplugins;version=" RINGPLUGINS_VERSION ";abi=" RING_TEXT(RINGPLUGINS_ABI) ";kernels=" RINGPLUGINS_KERNELS
    ";tensorrt_headers=" RING_TEXT(NV_TENSORRT_MAJOR) "." RING_TEXT(NV_TENSORRT_MINOR) ";";
