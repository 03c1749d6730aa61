// Continues a sequence of token ids, greedily: decode DIRECTORY RUNTIME_LIBRARY COUNT TOKEN...
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>

#include "ring_engine.h"

namespace {

constexpr long long kLargest = 1 << 30;

int64_t number(char const* text) {
  char* end = nullptr;
  long long const value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0 || value > kLargest) {
    throw std::runtime_error("'" + std::string(text) + "' is no token id and no count");
  }
  return value;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::cerr << "usage: decode BUNDLE/targets/TARGET libnvinfer.so.10|libtensorrt_rtx.so.1 COUNT TOKEN...\n";
    return 2;
  }
  try {
    int64_t const count = number(argv[3]);
    std::vector<int64_t> prompt;
    std::transform(argv + 4, argv + argc, std::back_inserter(prompt), number);
    ring::Engine engine(argv[1], argv[2]);
    auto state = engine.new_state(1, static_cast<int64_t>(prompt.size()) + count);
    auto logits = engine.feed({prompt}, state);
    for (int64_t step = 0; step < count; ++step) {
      auto const token = std::max_element(logits.begin(), logits.end()) - logits.begin();
      std::cout << token << (step + 1 < count ? " " : "\n") << std::flush;
      if (step + 1 < count) {
        logits = engine.feed({{token}}, state);
      }
    }
  } catch (std::exception const& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
  return 0;
}
