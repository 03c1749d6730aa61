#include "attention/decode.cuh"

namespace ringkernels::attention {
template Status dispatch_decode<__nv_bfloat16, __nv_bfloat16>(const AttentionDecodeParams&, const Workspace&,
                                                              int, Stream);
template Status dispatch_decode<__nv_bfloat16, __nv_fp8_e4m3>(const AttentionDecodeParams&, const Workspace&,
                                                              int, Stream);
}  // namespace ringkernels::attention
