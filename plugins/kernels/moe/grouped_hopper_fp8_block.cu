#include "moe/grouped_hopper.cuh"

namespace ringkernels::grouped {
template Status launch_hopper<Format::kFp8, true>(const Product&, bool, int64_t, int, bool, Stream);
}  // namespace ringkernels::grouped
