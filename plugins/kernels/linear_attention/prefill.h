// The launchers of prefill, one per dtype, so that they compile side by side.
#pragma once

#include "ringkernels/linear_attention.h"

namespace ringkernels {
namespace linear_attention {

struct PrefillPlan {
  int32_t segments;     // of the longest row
  int32_t parts;        // of a segment, each by its own block of segment_kernel
  int32_t part_tokens;  // a multiple of the chunk
  bool hopper;          // the kernels with wgmma
  size_t shared_bytes;  // that a block may have
};

template <typename T>
Status launch_prefill(const LinearAttentionPrefillParams& params, const PrefillPlan& plan, Stream stream);

}  // namespace linear_attention
}  // namespace ringkernels
