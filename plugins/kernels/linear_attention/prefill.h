// The launchers of prefill, one per dtype, so that they compile side by side.
#pragma once

#include "ringkernels/linear_attention.h"

namespace ringkernels {
namespace linear_attention {

// Blocks of segment_kernel: heads of rows are cut into segments if they are at most half as many. An SM of
// Hopper has one; elsewhere it has two, or one of head_dim 128 where it has less than 200 KB.
constexpr int kHopperShares = 132, kShares = 264;

struct PrefillPlan {
  int32_t segments;        // of the longest row
  int32_t segment_tokens;  // a multiple of the chunk
  bool hopper;             // the kernels with wgmma
  size_t shared_bytes;     // that a block may have
};

template <typename T>
Status launch_prefill(const LinearAttentionPrefillParams& params, const PrefillPlan& plan, Stream stream);

}  // namespace linear_attention
}  // namespace ringkernels
