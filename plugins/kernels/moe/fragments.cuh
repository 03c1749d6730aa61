// Weights times tokens on tensor cores with the weights as the 16-row operand A and up to 8 tokens as the
// columns of B. A dot product does not care about the order of k: each lane takes 16 contiguous bytes of
// weight row g and of its partner row straight from global memory, and the tokens' values in shared memory
// with the same k. So weights need no shared memory, no transposition, and any number of 16-byte loads may be
// in flight.
#pragma once

#include "common/vec.cuh"

namespace ringkernels::moe {

constexpr int kTokenTile = 8;      // columns of one mma
constexpr int kRowTile = 16;       // weight rows of one mma
constexpr int kSegmentBytes = 64;  // of a weight row, read by the four lanes of a quad
constexpr int kLaneBytes = 16;
constexpr int kScaleBlock = 128;  // elements of k that share a scale with ScaleKind::kBlock128

template <bool kBFloat16>
__device__ __forceinline__ void mma_16bit(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
  if constexpr (kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

__device__ __forceinline__ void mma_int8(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                         uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two FP8 codes as two halves, exactly.
__device__ __forceinline__ uint32_t half2_of_e4m3x2(uint32_t codes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return halves;
#else
  // Sign, exponent and mantissa moved to their places; the exponent bias differs by 8.
  const uint32_t spread = (codes & 0xffu) | ((codes & 0xff00u) << 8);
  const uint32_t bits = ((spread & 0x00800080u) << 8) | ((spread & 0x007f007fu) << 7);
  const __half2 halves = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.0f));
  return *reinterpret_cast<const uint32_t*>(&halves);
#endif
}

// How one weight format is multiplied. Activation: what the tokens are in shared memory.
struct Fp8Weights {
  using Activation = __half;  // codes as halves: exact, and mma.sync has no native FP8 on sm_80 to sm_90
  using Accumulator = float;
  static constexpr DType kType = DType::kFp8E4M3;
  static constexpr int kElementBytes = 1;

  // Two codes as halves.
  __device__ __forceinline__ static uint32_t encode(float first, float second) {
    return half2_of_e4m3x2(__nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, __NV_E4M3));
  }
};

struct Int8Weights {
  using Activation = int8_t;
  using Accumulator = int;
  static constexpr DType kType = DType::kInt8;
  static constexpr int kElementBytes = 1;

  __device__ __forceinline__ static uint16_t encode(float first, float second) {
    return static_cast<uint16_t>(static_cast<uint8_t>(to_int8(first)) | static_cast<uint8_t>(to_int8(second))
                                                                            << 8);
  }
};

template <typename T>
struct PlainWeights {
  using Activation = T;
  using Accumulator = float;
  static constexpr DType kType = DTypeOf<T>::value;
  static constexpr int kElementBytes = 2;

  __device__ __forceinline__ static uint32_t encode(float first, float second) {
    const T both[2] = {from_float<T>(first), from_float<T>(second)};
    return *reinterpret_cast<const uint32_t*>(both);
  }
};

template <typename Format>
constexpr int kSegmentElements = kSegmentBytes / Format::kElementBytes;
template <typename Format>
constexpr int kLaneElements = kLaneBytes / Format::kElementBytes;
// Bytes of a token in shared memory that one segment of a weight row meets.
template <typename Format>
constexpr int kTokenSegmentBytes = kSegmentElements<Format> * (int)sizeof(typename Format::Activation);

__host__ __device__ constexpr int segments_of(int elements, int element_bytes) {
  return (elements * element_bytes + kSegmentBytes - 1) / kSegmentBytes;
}

// Distance in bytes of two tokens in shared memory: the quads of a warp must meet different banks.
__host__ __device__ constexpr int token_pitch(DType weight_dtype, int elements) {
  const int segments =
      segments_of(elements, weight_dtype == DType::kBFloat16 || weight_dtype == DType::kFloat16 ? 2 : 1);
  if (weight_dtype == DType::kFp8E4M3) return segments * 2 * kSegmentBytes + 16;
  return segments % 2 == 0 ? (segments + 1) * kSegmentBytes : segments * kSegmentBytes;
}

// acc[t] += rows `low`, `high` of this lane times the tokens of tile t; tokens: this lane's 16 or 32 bytes.
template <typename Format, int kTiles>
__device__ __forceinline__ void multiply_segment(typename Format::Accumulator (&acc)[kTiles][4],
                                                 const uint4& low, const uint4& high, const uint8_t* tokens,
                                                 int tile_pitch) {
  const uint32_t rows[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
  if constexpr (Format::kType == DType::kFp8E4M3) {
    uint32_t b[kTiles][8];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      *reinterpret_cast<uint4*>(&b[t][0]) = *reinterpret_cast<const uint4*>(tokens + t * tile_pitch);
      *reinterpret_cast<uint4*>(&b[t][4]) = *reinterpret_cast<const uint4*>(tokens + t * tile_pitch + 16);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t a0 = half2_of_e4m3x2(rows[0][j]), a2 = half2_of_e4m3x2(rows[0][j] >> 16);
      const uint32_t a1 = half2_of_e4m3x2(rows[1][j]), a3 = half2_of_e4m3x2(rows[1][j] >> 16);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) mma_16bit<false>(acc[t], a0, a1, a2, a3, b[t][2 * j], b[t][2 * j + 1]);
    }
  } else {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 words = *reinterpret_cast<const uint4*>(tokens + t * tile_pitch);
      const uint32_t b[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t a0 = rows[0][2 * j], a1 = rows[1][2 * j];
        const uint32_t a2 = rows[0][2 * j + 1], a3 = rows[1][2 * j + 1];
        if constexpr (Format::kType == DType::kInt8) {
          mma_int8(acc[t], a0, a1, a2, a3, b[2 * j], b[2 * j + 1]);
        } else {
          mma_16bit<Format::kType == DType::kBFloat16>(acc[t], a0, a1, a2, a3, b[2 * j], b[2 * j + 1]);
        }
      }
    }
  }
}

}  // namespace ringkernels::moe
