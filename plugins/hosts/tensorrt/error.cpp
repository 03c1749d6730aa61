#include "error.h"

#include <atomic>
#include <cstdio>

namespace ringplugins {

namespace {
// The interface of TensorRT hands the logger to the library as a whole.
std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};
}  // namespace

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void log_error(std::string const& message) noexcept {
  try {
    auto* finder = logger_finder.load();
    auto* logger = finder != nullptr ? finder->findLogger() : nullptr;
    if (logger != nullptr) {
      logger->log(nvinfer1::ILogger::Severity::kERROR, message.c_str());
      return;
    }
  } catch (...) {  // a logger that fails must not end the process
  }
  std::fprintf(stderr, "ringplugins: %s\n", message.c_str());
}

}  // namespace ringplugins
