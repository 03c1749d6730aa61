// The C interface of the kernel library, for hosts that load it at run time (ringexport/kernels/library.py).
// Every op has three functions: ring_<op>_validate, ring_<op>_workspace_bytes and ring_<op>_launch.
#include <cstdio>
#include <cstring>

#include "ringkernels/attention.h"
#include "ringkernels/embed.h"
#include "ringkernels/linear_attention.h"
#include "ringkernels/moe.h"
#include "ringkernels/norm.h"
#include "ringkernels/projection.h"
#include "ringkernels/sample.h"
#include "ringkernels_layout.inc"

#define RING_PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

using ringkernels::Status;
using ringkernels::Stream;

// Writes what is wrong into the caller's buffer; returns the status code.
int report(const Status& status, char* message, size_t size) {
  if (!status.ok() && message != nullptr && size > 0) {
    std::snprintf(message, size, "%s is %lld, expected %s", status.field, (long long)status.got, status.expected);
  }
  return (int)status.code;
}

}  // namespace

// JSON: struct name -> [[field, C type], ...], read off the headers when the library was built.
RING_PUBLIC const char* ring_layout() { return kRingLayout; }

#define RING_OP(op, Params)                                                                            \
  RING_PUBLIC int ring_##op##_validate(const ringkernels::Params* params, char* message, size_t size) { \
    return report(ringkernels::validate(*params), message, size);                                       \
  }                                                                                                    \
  RING_PUBLIC size_t ring_##op##_workspace_bytes(const ringkernels::Params* params) {                   \
    return ringkernels::workspace_bytes(*params);                                                       \
  }                                                                                                    \
  RING_PUBLIC size_t ring_##op##_params_bytes() { return sizeof(ringkernels::Params); }                 \
  RING_PUBLIC int ring_##op##_launch(const ringkernels::Params* params, Stream stream, char* message,   \
                                     size_t size) {                                                    \
    return report(ringkernels::launch(*params, stream), message, size);                                 \
  }

RING_OP(linear_attention_decode, LinearAttentionDecodeParams)
RING_OP(linear_attention_prefill, LinearAttentionPrefillParams)
RING_OP(rms_norm, RmsNormParams)
RING_OP(group_norm_gate, GroupNormGateParams)
RING_OP(quantize, QuantizeParams)
RING_OP(qk_norm_rotary, QkNormRotaryParams)
RING_OP(projection, ProjectionParams)
RING_OP(router, RouterParams)
RING_OP(experts, ExpertsParams)
RING_OP(attention_decode, AttentionDecodeParams)
RING_OP(attention_prefill, AttentionPrefillParams)
RING_OP(sample, SampleParams)
RING_OP(embed, EmbedParams)
