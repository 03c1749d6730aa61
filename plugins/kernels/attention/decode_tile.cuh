// One warp's tile of flash-decoding: 4 KB of keys or values, as fragments of the tensor cores.
//
// A product does not care in which order it sums, so each lane reads 16 contiguous bytes and calls them the
// elements that mma.m16n8k16 wants from it; the query is permuted alike. Shared memory is a queue per warp,
// filled by contiguous copies (half of the read rate is lost if a copy covers half lines) and swizzled
// against bank conflicts. In a lane, g = lane / 4 and t = lane % 4 as in the PTX manual's fragments.
#pragma once

#include <type_traits>

#include "common/fp8_to_half.cuh"
#include "common/vec.cuh"

namespace ringkernels::attention {

template <typename Mma>
__device__ __forceinline__ void mma_16816(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
#define RING_MMA(type)                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])             \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<Mma, __half>) {
    RING_MMA("f16");
  } else {
    RING_MMA("bf16");
  }
#undef RING_MMA
}

template <int kBytes>
struct Words;
template <>
struct Words<16> {
  uint32_t w[4];
};
template <>
struct Words<8> {
  uint32_t w[2];
};

// Starts a copy that bypasses L1: the cache is read once and by one block.
__device__ __forceinline__ void start_copy(void* to, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kInFlight>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

template <typename Cache_, int kHeadDim_, bool kWide_>
struct Tile {
  using Cache = Cache_;
  static constexpr bool kFp8 = sizeof(Cache) == 1;
  using Mma = std::conditional_t<kFp8, __half, Cache>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kWide = kWide_;
  static constexpr int kHeadTiles = kWide ? 2 : 1;                   // of 8 query heads
  static constexpr int kTokens = 4096 / (kHeadDim * sizeof(Cache));  // 4 KB of keys, 4 KB of values
  static constexpr int kSteps = kTokens / 16;                        // of 16 tokens
  static constexpr int kKeyVec = 16 / sizeof(Cache);                 // dims a lane reads at once
  static constexpr int kKeyLoads = kHeadDim / (4 * kKeyVec);
  static constexpr int kValueVec = kHeadDim / 8 < kKeyVec ? kHeadDim / 8 : kKeyVec;
  static constexpr int kValueLoads = kHeadDim / (8 * kValueVec);
  static constexpr int kQueryRegs = 2 * kHeadTiles;  // per 16 dims

  using KeyWords = Words<16>;
  using ValueWords = Words<kValueVec * sizeof(Cache)>;
  static constexpr int kSlotBytes = 4096;
  static constexpr int kRowBytes = kHeadDim * sizeof(Cache);
  static constexpr int kCopies = kSlotBytes / 512;  // of a lane
  static constexpr bool kSwizzle = kRowBytes >= 128;

  // Token within the tile of key load (step, j), and of value load (step, i).
  __device__ static int key_token(int lane, int step, int j) {
    return step * 16 + (lane >> 3) * 4 + 2 * j + (lane >> 2 & 1);
  }
  __device__ static int value_token(int lane, int step, int i) { return step * 16 + (lane & 3) * 4 + i; }
  __device__ static int key_dim(int lane, int load) { return (load * 4 + (lane & 3)) * kKeyVec; }
  __device__ static int value_dim(int lane, int load) { return (load * 8 + (lane >> 2)) * kValueVec; }

  // Where byte `offset` (a multiple of a lane's access) of a token's row lies in a slot.
  template <bool kValues>
  __device__ static __forceinline__ int place(int token, int offset) {
    const int swizzle = kValues ? (token >> 2 & 3) << 5 : (token & 1) << 6;
    return token * kRowBytes + (kSwizzle ? offset ^ swizzle : offset);
  }

  // rows: the first token of the tile [kTokens, kHeadDim]; tokens beyond `last` repeat it, for the cache may
  // end there.
  template <bool kValues>
  __device__ static __forceinline__ void copy(uint8_t* slot, const Cache* rows, int last, int lane) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int position = i * 512 + lane * 16, token = position / kRowBytes, offset = position % kRowBytes;
      start_copy(slot + place<kValues>(token, offset),
                 reinterpret_cast<const uint8_t*>(rows) + min(token, last) * kRowBytes + offset);
    }
  }

  // The new token is not in the cache yet: put it where it belongs, and beyond, where the weights are 0.
  template <bool kValues>
  __device__ static __forceinline__ void patch(uint8_t* slot, const Cache* row, int last, int lane) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int position = i * 512 + lane * 16, token = position / kRowBytes, offset = position % kRowBytes;
      if (token >= last)
        *reinterpret_cast<uint4*>(slot + place<kValues>(token, offset)) =
            *reinterpret_cast<const uint4*>(reinterpret_cast<const uint8_t*>(row) + offset);
    }
    __syncwarp();
  }

  // s[2 * step + j][2 * h + c]: head g + 8 h, token value_token(lane, step, 2 * j + c). The query heads are
  // the rows of the 16-row operand; query: registers as `load_query` fills them.
  __device__ static __forceinline__ void scores(float (&s)[2 * kSteps][4], const uint8_t* slot,
                                                const uint32_t (&query)[kHeadDim / 16][kQueryRegs],
                                                int lane) {
    const uint8_t* first = slot + place<false>(key_token(lane, 0, 0), key_dim(lane, 0) * (int)sizeof(Cache));
    const uint8_t* second =
        slot + place<false>(key_token(lane, 0, 0), key_dim(lane, 0) * (int)sizeof(Cache) + 64);
#pragma unroll
    for (int pair = 0; pair < 2 * kSteps; ++pair) {
#pragma unroll
      for (float& value : s[pair]) value = 0.0f;
#pragma unroll
      for (int load = 0; load < kKeyLoads; ++load) {
        // Loads of a pair lie 64 bytes apart, which of them first is the swizzle.
        const uint8_t* from =
            (kSwizzle && load % 2 != 0 ? second : first) + (pair / 2 * 16 + pair % 2 * 2) * kRowBytes;
        const KeyWords words =
            *reinterpret_cast<const KeyWords*>(from + (kSwizzle ? load / 2 * 128 : load * 64));
        const uint32_t (&w)[4] = words.w;
#pragma unroll
        for (int k = 0; k < kKeyVec / 4; ++k) {
          const uint32_t b0 = kFp8 ? fp8_pair_to_half2(w[k % 4] & 0xffff) : w[2 * k % 4];
          const uint32_t b1 = kFp8 ? fp8_pair_to_half2(w[k % 4] >> 16) : w[(2 * k + 1) % 4];
          const uint32_t (&q)[kQueryRegs] = query[load * (kKeyVec / 4) + k];
          mma_16816<Mma>(s[pair], q[0], kWide ? q[2 % kQueryRegs] : 0, q[1], kWide ? q[3 % kQueryRegs] : 0,
                         b0, b1);
        }
      }
    }
  }

  // query: [16, stride] Mma in shared memory -> rows g and g + 8 in the order of the key loads.
  __device__ static __forceinline__ void load_query(uint32_t (&regs)[kHeadDim / 16][kQueryRegs],
                                                    const Mma* query, int stride, int lane) {
#pragma unroll
    for (int load = 0; load < kKeyLoads; ++load)
#pragma unroll
      for (int k = 0; k < kKeyVec / 4; ++k)
#pragma unroll
        for (int half = 0; half < kQueryRegs / 2; ++half) {
          const Mma* from = query + ((lane >> 2) + 8 * half) * stride + key_dim(lane, load) + 4 * k;
          const uint2 pair = *reinterpret_cast<const uint2*>(from);
          regs[load * (kKeyVec / 4) + k][2 * half] = pair.x;
          regs[load * (kKeyVec / 4) + k][2 * half + 1] = pair.y;
        }
  }

  // output[load * kValueVec / 2 + j][4 * h + 2 * i + c] += weights x values: head 2 t + c + 8 h, dim
  // value_dim + 2 j + i. Here the values are the 16-row operand, so that no register is spent on heads that
  // do not exist.
  __device__ static __forceinline__ void accumulate(float (&output)[kHeadDim / 16][4 * kHeadTiles],
                                                    const uint8_t* slot,
                                                    const float (&weights)[2 * kSteps][4], int lane) {
    const uint8_t* from =
        slot + place<true>(value_token(lane, 0, 0), value_dim(lane, 0) * (int)sizeof(Cache));
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t b[kHeadTiles][2];
#pragma unroll
      for (int h = 0; h < kHeadTiles; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          b[h][j] = pack(weights[2 * step + j][2 * h], weights[2 * step + j][2 * h + 1]);
#pragma unroll
      for (int load = 0; load < kValueLoads; ++load) {
        ValueWords words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          words[i] = *reinterpret_cast<const ValueWords*>(from + (step * 16 + i) * kRowBytes +
                                                          load * 8 * (int)sizeof(ValueWords));
#pragma unroll
        for (int j = 0; j < kValueVec / 2; ++j) {
          const uint32_t a0 = value_pair(words[0], words[1], 2 * j),
                         a1 = value_pair(words[0], words[1], 2 * j + 1);
          const uint32_t a2 = value_pair(words[2], words[3], 2 * j),
                         a3 = value_pair(words[2], words[3], 2 * j + 1);
#pragma unroll
          for (int h = 0; h < kHeadTiles; ++h) {
            float (&d)[4] = reinterpret_cast<float (*)[4]>(output[load * (kValueVec / 2) + j])[h];
            mma_16816<Mma>(d, a0, a1, a2, a3, b[h][0], b[h][1]);
          }
        }
      }
    }
  }

 private:
  __device__ static __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<Mma, __half>) {
      const __half2 both = __floats2half2_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&both);
    } else {
      const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const uint32_t*>(&both);
    }
  }
  // Element j of two tokens side by side.
  __device__ static __forceinline__ uint32_t value_pair(const ValueWords& a, const ValueWords& b, int j) {
    constexpr int kPerWord = 4 / sizeof(Cache);
    const uint32_t first = a.w[j / kPerWord], second = b.w[j / kPerWord];
    if constexpr (kFp8) {
      const uint32_t bytes = __byte_perm(first, second, j % 4 < 2 ? 0x5140 : 0x7362);
      return fp8_pair_to_half2(j % 2 == 0 ? bytes & 0xffff : bytes >> 16);
    } else {
      return __byte_perm(first, second, j % 2 == 0 ? 0x5410 : 0x7632);
    }
  }
};

}  // namespace ringkernels::attention
