// The paths for few tokens: one translation unit per weight format, and the plan that they share.
#pragma once

#include <cstddef>

#include "ringkernels/moe.h"

namespace ringkernels::moe {

// Tokens of one expert for one block of the sorted path.
struct Group {
  int expert;  // num_experts: the shared one
  int first;   // in the list of pairs
  int count;
  int unused;
};

// Where things lie in the workspace; pair = token * choices + choice, the last choice is the shared expert.
// "Prepared" rows are as shared memory wants them: FP8 codes as halves, INT8 codes, or the activation dtype.
struct ExpertsPlan {
  uint8_t* codes;       // [N, D] prepared, or null: the caller's input will do
  float* code_scales;   // [N, scales]
  float* intermediate;  // [N * choices, widest] SwiGLU outputs
  // Of the direct path:
  uint8_t* intermediate_codes;  // [N * choices, widest] prepared
  float* intermediate_scales;   // [N * choices, scales]
  // Of the sorted path:
  float* results;  // [N * choices, D]
  int* group_count;
  Group* groups;
  int* pairs;  // [N * choices] sorted by expert, the shared expert last
  int tokens_per_group;
  size_t bytes;
};

// Shared memory that a block may have: 227 KB on some GPUs, 99 KB on others.
size_t shared_limit();
ExpertsPlan plan_experts(const ExpertsParams& p, bool sorted);

template <typename Format>
struct ExpertsPath {
  static Status launch_direct(const ExpertsParams& p, Stream stream);
  static Status launch_sorted(const ExpertsParams& p, Stream stream);
};

Status launch_combine(const ExpertsParams& p, const ExpertsPlan& plan, Stream stream);

}  // namespace ringkernels::moe
