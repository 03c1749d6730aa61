// The one exception of the host, and how it leaves it: as a log line. Nothing is thrown across the plugin border.
#pragma once

#include <NvInferRuntime.h>

#include <stdexcept>
#include <string>

namespace ringplugins {

class PluginError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Set by TensorRT through setLoggerFinder; without one, messages go to stderr.
void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
void log_error(std::string const& message) noexcept;

}  // namespace ringplugins
