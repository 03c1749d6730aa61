// 16-byte accesses, conversions between number formats, and warp reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "ringkernels/types.h"

namespace ringkernels {

constexpr int kOctet = 8;  // neighbouring elements that a thread handles at a time

enum class Format { kFp8, kInt8, kBFloat16, kFloat16 };  // that tensor cores multiply

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<__half> {
  static constexpr DType value = DType::kFloat16;
};
template <>
struct DTypeOf<__nv_bfloat16> {
  static constexpr DType value = DType::kBFloat16;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__nv_fp8_e4m3 x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements that are read or written in one access.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];

  __device__ __forceinline__ static Vec load(const T* address) { return *reinterpret_cast<const Vec*>(address); }
  __device__ __forceinline__ void store(T* address) const { *reinterpret_cast<Vec*>(address) = *this; }
};

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// NaN if either number is. The scale of a row with a NaN is found with it: codes cannot say so.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    value = max_or_nan(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Largest code of an 8-bit format as the quantizer of ringexport/quantize uses it: see number_range().
__host__ __device__ constexpr float number_range(DType type) { return type == DType::kInt8 ? 127.5f : 448.0f; }

// Rows below this count as zeros where codes come from a product with the reciprocal of their scale, which
// would be infinite.
constexpr float kLeastAbsmax = 1e-30f;

// Round a scaled number to an 8-bit code: to nearest even, saturating.
__device__ __forceinline__ uint8_t to_fp8_e4m3(float scaled) {
  return __nv_cvt_float_to_fp8(scaled, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ int8_t to_int8(float scaled) {
  return static_cast<int8_t>(max(-128, min(127, __float2int_rn(scaled))));
}

}  // namespace ringkernels
