// What norms and quantization do to eight neighbouring elements of a row, and how a row's statistics are
// shared.
#pragma once

#include <cfloat>

#include "common/vec.cuh"
#include "ringkernels/types.h"

namespace ringkernels {

constexpr int kMaxNormGroups = 32;  // one lane of a warp per group
constexpr int kScaleBlock = 128;    // elements that share a scale in ScaleKind::kBlock128

// Eight elements as they lie in memory; `high` is used by fp32 only. Loads are apart from unpack() so that
// several of them are in flight before the first is waited for.
struct RawOctet {
  uint4 low;
  uint4 high;
};

__device__ __forceinline__ RawOctet load_raw(const void* base, int64_t index, DType dtype) {
  RawOctet raw;
  const auto* address = static_cast<const char*>(base) + index * (int64_t)size_of(dtype);
  raw.low = *reinterpret_cast<const uint4*>(address);
  raw.high = make_uint4(0, 0, 0, 0);
  if (dtype == DType::kFloat32) raw.high = *reinterpret_cast<const uint4*>(address + 16);
  return raw;
}

__device__ __forceinline__ void unpack(const RawOctet& raw, DType dtype, float (&x)[kOctet]) {
  const unsigned words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                             raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = __uint_as_float(words[i]);
  } else if (dtype == DType::kFloat16) {
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet / 2; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

__device__ __forceinline__ void load_octet(const void* base, int64_t index, DType dtype, float (&x)[kOctet]) {
  unpack(load_raw(base, index, dtype), dtype, x);
}

// Eight floats as four 16-bit pairs.
__device__ __forceinline__ uint4 pack_half(const float (&x)[kOctet], DType dtype) {
  unsigned words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kFloat16) {
      const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      words[i] = reinterpret_cast<const unsigned&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      words[i] = reinterpret_cast<const unsigned&>(pair);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ void store_octet(void* base, int64_t index, DType dtype,
                                            const float (&x)[kOctet]) {
  auto* address = static_cast<char*>(base) + index * (int64_t)size_of(dtype);
  if (dtype == DType::kFloat32) {
    *reinterpret_cast<float4*>(address) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(address + 16) = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<uint4*>(address) = pack_half(x, dtype);
  }
}

// x / scale for many x: the product with the reciprocal, corrected once by its exact remainder, is the
// rounded quotient. Scales so small that the reciprocal or the remainder leaves the normal range are divided
// by.
class Divider {
 public:
  __device__ __forceinline__ explicit Divider(float scale)
      : scale_(scale), inverse_(scale > 1e-30f ? 1.0f / scale : 0.0f) {}

  __device__ __forceinline__ float operator()(float x) const {
    if (inverse_ == 0.0f) return x / scale_;
    const float quotient = x * inverse_;
    return fmaf(fmaf(-quotient, scale_, x), inverse_, quotient);
  }

 private:
  float scale_;
  float inverse_;
};

// The dynamic scale of a tile whose largest magnitude is given; a tile of zeros gets any positive number, one
// with a NaN gets NaN.
__device__ __forceinline__ float dynamic_scale(float largest, DType dtype) {
  const float scale = largest / number_range(dtype);
  return scale == 0.0f ? FLT_EPSILON : scale;
}

// Eight codes, the first in the lowest byte.
__device__ __forceinline__ uint2 quantize_octet(const float (&x)[kOctet], float scale, DType dtype) {
  const Divider divide(scale);
  unsigned words[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float a = divide(x[4 * half]), b = divide(x[4 * half + 1]);
    const float c = divide(x[4 * half + 2]), d = divide(x[4 * half + 3]);
    if (dtype == DType::kFp8E4M3) {
      const unsigned low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
      const unsigned high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
      words[half] = low | high << 16;
    } else {
      words[half] = (uint8_t)to_int8(a) | (uint8_t)to_int8(b) << 8 | (uint8_t)to_int8(c) << 16 |
                    (unsigned)(uint8_t)to_int8(d) << 24;
    }
  }
  return make_uint2(words[0], words[1]);
}

__device__ __forceinline__ float largest_of(const float (&x)[kOctet]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) largest = max_or_nan(largest, fabsf(x[i]));
  return largest;
}

// Over 16 neighbouring lanes, which hold one block of 128.
__device__ __forceinline__ float block_max(float value) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2)
    value = max_or_nan(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// How a row's sums are gathered: every `width` neighbouring octets (lanes) leave one partial result in shared
// memory, and `per_group` of them make up a norm group. One fixed order of sums: results do not depend on
// timing.
struct RowLayout {
  int groups;
  int octets_per_group;
  int width;
  int per_group;
  float group_size;

  __host__ __device__ static RowLayout of(int columns, int groups) {
    RowLayout layout;
    layout.groups = groups;
    layout.octets_per_group = columns / kOctet / groups;
    layout.width = 32;
    while (groups > 1 && layout.octets_per_group % layout.width != 0) layout.width /= 2;
    layout.per_group = (layout.octets_per_group + layout.width - 1) / layout.width;
    layout.group_size = (float)(columns / groups);
    return layout;
  }
  __host__ __device__ int partials() const { return groups * per_group; }
};

// x: sum of squares; y: largest magnitude of what remains to be multiplied by the norm's factor.
__device__ __forceinline__ void leave_partial(float2* partials, const RowLayout& layout, int octet,
                                              bool inside, float2 value) {
  for (int offset = layout.width / 2; offset > 0; offset /= 2) {
    value.x += __shfl_xor_sync(0xffffffffu, value.x, offset);
    value.y = max_or_nan(value.y, __shfl_xor_sync(0xffffffffu, value.y, offset));
  }
  if (inside && octet % layout.width == 0) partials[octet / layout.width] = value;
}

// A row's statistics as every lane of a warp knows them after gather_row().
struct RowStats {
  float group_factor;  // of group `lane` (of the only group, in every lane): 1 / rms
  float largest;       // magnitude in the whole row, after the norm

  __device__ __forceinline__ float factor(const RowLayout& layout, int octet) const {
    if (layout.groups == 1) return group_factor;
    return __shfl_sync(0xffffffffu, group_factor, min(octet / layout.octets_per_group, layout.groups - 1));
  }
};

// eps < 0: no norm, only the largest magnitude.
__device__ __forceinline__ RowStats gather_row(const float2* partials, const RowLayout& layout, float eps) {
  const int lane = threadIdx.x % 32;
  const bool alone = layout.groups == 1;
  const int first = alone ? lane : lane * layout.per_group;
  const int count = alone ? layout.per_group : (lane + 1) * layout.per_group;
  const int stride = alone ? 32 : 1;
  float2 sum = make_float2(0.0f, 0.0f);
  if (alone || lane < layout.groups) {
    for (int i = first; i < count; i += stride) {
      const float2 partial = partials[i];
      sum.x += partial.x;
      sum.y = max_or_nan(sum.y, partial.y);
    }
  }
  if (alone) sum.x = warp_sum(sum.x);
  RowStats stats;
  stats.group_factor = eps < 0.0f ? 1.0f : 1.0f / sqrtf(sum.x / layout.group_size + eps);
  stats.largest = warp_max(sum.y * stats.group_factor);
  return stats;
}

}  // namespace ringkernels
