#include "common/check.h"
#include "linear_attention/prefill_launch.cuh"

namespace ringkernels {
namespace linear_attention {

template Status launch_prefill<__nv_bfloat16>(const LinearAttentionPrefillParams&, const PrefillPlan&,
                                              Stream);

}  // namespace linear_attention
}  // namespace ringkernels
