// FP8 to fp16 in registers, exact.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace ringkernels {

// The two FP8-E4M3 numbers in the low half of `pair`, as half2.
__device__ __forceinline__ uint32_t fp8_pair_to_half2(uint32_t pair) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return static_cast<uint32_t>(raw.x) | static_cast<uint32_t>(raw.y) << 16;
#else
  // The bits of an FP8 number are those of an fp16 number 2^8 smaller, subnormals too. NaN becomes 480: a row
  // with a NaN has a scale that says so, see max_or_nan().
  const uint32_t bytes = __byte_perm(pair, 0, 0x1404);
  const uint32_t small = (bytes & 0x7f007f00u) >> 1 | (bytes & 0x80008000u);
  const __half2 wide = __hmul2(*reinterpret_cast<const __half2*>(&small), __float2half2_rn(256.0f));
  return *reinterpret_cast<const uint32_t*>(&wide);
#endif
}

}  // namespace ringkernels
