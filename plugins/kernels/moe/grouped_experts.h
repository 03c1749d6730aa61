// Experts for many tokens: pairs sorted by expert, then two grouped matrix products on large tiles.
// validate(), workspace_bytes() and launch() of ExpertsParams choose between this and the paths for few tokens.
#pragma once

#include "ringkernels/moe.h"

namespace ringkernels {

// The start of the workspace: a counter that this path leaves at zero and expects to find there, whatever
// other paths have run on the same workspace in between. They write behind it.
constexpr int kGroupedCounterBytes = 1024;

// Whether this path serves the given shape, number formats and scales. Pointers may be missing.
bool grouped_experts_supports(const ExpertsParams& params);
size_t grouped_experts_workspace_bytes(const ExpertsParams& params);
size_t grouped_experts_zeroed_bytes(const ExpertsParams& params);
Status launch_grouped_experts(const ExpertsParams& params, Stream stream);

}  // namespace ringkernels
