#include "attention/decode.cuh"

namespace ringkernels::attention {
template Status dispatch_decode<__half, __half>(const AttentionDecodeParams&, const Workspace&, int, Stream);
template Status dispatch_decode<__half, __nv_fp8_e4m3>(const AttentionDecodeParams&, const Workspace&, int,
                                                       Stream);
}  // namespace ringkernels::attention
