// Takes the place of the kernel library in ringplugins_trt_host, which exists to build and check engines where
// nothing can run: tests link it in seconds, on machines without nvcc too. Every launch is refused.
#include "ringkernels/attention.h"
#include "ringkernels/linear_attention.h"
#include "ringkernels/moe.h"
#include "ringkernels/projection.h"
#include "rows.h"

namespace ringkernels {

namespace {
constexpr Status kNoKernels{StatusCode::kUnsupported, "kernels", "a plugin library with kernels", 0};
}

#define RING_NO_KERNELS(Params)                                 \
  Status validate(const Params&) { return {}; }                 \
  size_t workspace_bytes(const Params&) { return 256; }         \
  Status launch(const Params&, Stream) { return kNoKernels; }

RING_NO_KERNELS(AttentionDecodeParams)
RING_NO_KERNELS(AttentionPrefillParams)
RING_NO_KERNELS(LinearAttentionDecodeParams)
RING_NO_KERNELS(LinearAttentionPrefillParams)
RING_NO_KERNELS(RouterParams)
RING_NO_KERNELS(ExpertsParams)
RING_NO_KERNELS(ProjectionParams)

size_t zeroed_workspace_bytes(const ExpertsParams& params) { return workspace_bytes(params); }
size_t max_workspace_bytes(const LinearAttentionPrefillParams&) { return 256; }
size_t max_workspace_bytes(const RouterParams&) { return 256; }

}  // namespace ringkernels

namespace ringplugins {

cudaError_t append(AppendParams const&, cudaStream_t) { return cudaErrorNotSupported; }

}  // namespace ringplugins
