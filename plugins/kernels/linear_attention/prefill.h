// The launchers of prefill, one per dtype, so that they compile side by side.
#pragma once

#include "ringkernels/linear_attention.h"

namespace ringkernels {
namespace linear_attention {

// Blocks of segment_kernel are as many as run at once, up to these: the workspace has to be known without the
// GPU. Heads of rows are cut into segments if they are at most half as many.
constexpr int kMaxHopperShares = 132, kMaxPortableShares = 264;

struct PrefillPlan {
  int32_t segments;        // of the longest row
  int32_t segment_tokens;  // a multiple of the chunk
  bool hopper;             // the kernels with wgmma
  size_t shared_bytes;     // that a block may have
  size_t sm_shared_bytes;  // of an SM
  int32_t sms;
};

template <typename T>
Status launch_prefill(const LinearAttentionPrefillParams& params, const PrefillPlan& plan, Stream stream);

}  // namespace linear_attention
}  // namespace ringkernels
