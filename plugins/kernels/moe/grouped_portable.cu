#include "moe/grouped_portable.cuh"

namespace ringkernels::grouped {
template Status launch_portable<Format::kFp8, false>(const Product&, bool, int, bool, Stream);
template Status launch_portable<Format::kFp8, true>(const Product&, bool, int, bool, Stream);
template Status launch_portable<Format::kInt8, false>(const Product&, bool, int, bool, Stream);
template Status launch_portable<Format::kBFloat16, false>(const Product&, bool, int, bool, Stream);
template Status launch_portable<Format::kFloat16, false>(const Product&, bool, int, bool, Stream);
}  // namespace ringkernels::grouped
