// Weight formats as operand A of mma.sync (16 rows), tokens as its 8 columns.
//
// A dot product does not care about the order of k. So a lane takes 16 bytes that lie together in memory of
// weight rows g and g + 8 (g = lane / 4) as its part of the A fragments of several mma, and the same k of
// token g as B. The four lanes that share g take 64 bytes of a row, a "plane". Tokens lie in shared memory in
// the order in which lanes read them: plane by plane, 64 bytes of every token. Weights travel in steps of two
// planes, whole cache lines.
#pragma once

#include "common/vec.cuh"
#include "norm/row_math.cuh"

namespace ringkernels {

constexpr int kPlaneBytes = 64;
constexpr int kStepBytes = 2 * kPlaneBytes;

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                             unsigned a3, unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                                     unsigned a3, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], unsigned a0, unsigned a1,
                                                            unsigned a2, unsigned a3, unsigned b0,
                                                            unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                             unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four E4M3 codes as fp16. Exact: fp16 holds every E4M3 number. Without the instruction (before sm_89) the
// bits are moved into place; the exponent biases differ by 8, so that kFp8Gain is left to multiply by.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
constexpr float kFp8Gain = 1.0f;
__device__ __forceinline__ uint2 fp8_to_half(unsigned codes) {
  uint2 pairs;
  asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(codes));
  return pairs;
}
#else
constexpr float kFp8Gain = 256.0f;
__device__ __forceinline__ uint2 fp8_to_half(unsigned codes) {
  const unsigned low = __byte_perm(codes, 0, 0x1404), high = __byte_perm(codes, 0, 0x3424);
  return make_uint2((low & 0x80008000u) | ((low & 0x7f007f00u) >> 1),
                    (high & 0x80008000u) | ((high & 0x7f007f00u) >> 1));
}
#endif

// E4M3 weights and tokens, multiplied as fp16 with fp32 sums: what mma.sync in E4M3 does on sm_90 too, while
// wgmma in E4M3 sums in less than fp32.
struct Fp8Operand {
  using Sum = float;
  static constexpr bool kQuantized = true;
  static constexpr DType kDType = DType::kFp8E4M3;
  static constexpr int kBytes = 1;  // of a weight

  struct Rows {
    uint2 low[4], high[4];  // four codes each, of rows g and g + 8
    __device__ __forceinline__ Rows(uint4 row, uint4 row8)
        : low{fp8_to_half(row.x), fp8_to_half(row.y), fp8_to_half(row.z), fp8_to_half(row.w)},
          high{fp8_to_half(row8.x), fp8_to_half(row8.y), fp8_to_half(row8.z), fp8_to_half(row8.w)} {}
  };
  struct Tokens {
    uint2 part[4];
    __device__ __forceinline__ explicit Tokens(uint4 x)
        : part{fp8_to_half(x.x), fp8_to_half(x.y), fp8_to_half(x.z), fp8_to_half(x.w)} {}
  };
  static __device__ __forceinline__ void multiply(Sum (&sum)[4], const Rows& a, const Tokens& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma_m16n8k16<__half>(sum, a.low[i].x, a.high[i].x, a.low[i].y, a.high[i].y, b.part[i].x, b.part[i].y);
  }
  static __device__ __forceinline__ float gain() { return kFp8Gain * kFp8Gain; }
};

// Formats whose fragments are the bytes as they are.
struct PlainRows {
  uint4 row, row8;
  __device__ __forceinline__ PlainRows(uint4 a, uint4 b) : row(a), row8(b) {}
};
struct PlainTokens {
  uint4 x;
  __device__ __forceinline__ explicit PlainTokens(uint4 a) : x(a) {}
};

struct Int8Operand {
  using Sum = int;
  static constexpr bool kQuantized = true;
  static constexpr DType kDType = DType::kInt8;
  static constexpr int kBytes = 1;
  using Rows = PlainRows;
  using Tokens = PlainTokens;

  static __device__ __forceinline__ void multiply(Sum (&sum)[4], const Rows& a, const Tokens& b) {
    mma_m16n8k32(sum, a.row.x, a.row8.x, a.row.y, a.row8.y, b.x.x, b.x.y);
    mma_m16n8k32(sum, a.row.z, a.row8.z, a.row.w, a.row8.w, b.x.z, b.x.w);
  }
  static __device__ __forceinline__ float gain() { return 1.0f; }
};

template <typename T>
struct HalfOperand {
  using Sum = float;
  static constexpr bool kQuantized = false;
  static constexpr DType kDType = DTypeOf<T>::value;
  static constexpr int kBytes = 2;
  using Rows = PlainRows;
  using Tokens = PlainTokens;

  static __device__ __forceinline__ void multiply(Sum (&sum)[4], const Rows& a, const Tokens& b) {
    mma_m16n8k16<T>(sum, a.row.x, a.row8.x, a.row.y, a.row8.y, b.x.x, b.x.y);
    mma_m16n8k16<T>(sum, a.row.z, a.row8.z, a.row.w, a.row8.w, b.x.z, b.x.w);
  }
  static __device__ __forceinline__ float gain() { return 1.0f; }
};

}  // namespace ringkernels
