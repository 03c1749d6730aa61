// The sm_90a instructions of the grouped products: wgmma, bulk tensor copies, mbarriers.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "moe/grouped_plan.cuh"

namespace ringkernels::grouped {

template <Format kFormat>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<Format::kInt8> {
  using type = int32_t;
};

// Operand tiles in shared memory: rows of 128 bytes, 128-byte swizzle, the sum runs along a row.
__device__ __forceinline__ uint64_t operand_descriptor(uint32_t shared_address) {
  constexpr uint64_t kEightRows = 1024 >> 4, kSwizzle128 = 1;
  return static_cast<uint64_t>((shared_address & 0x3ffff) >> 4) | 1ull << 16 | kEightRows << 32 |
         kSwizzle128 << 62;
}

__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// The compiler may not move accesses of the accumulators over the asynchronous products.
template <int kCount>
__device__ __forceinline__ void pin(float (&values)[kCount]) {
#pragma unroll
  for (float& value : values) asm volatile("" : "+f"(value)::"memory");
}
template <int kCount>
__device__ __forceinline__ void pin(int32_t (&values)[kCount]) {
#pragma unroll
  for (int32_t& value : values) asm volatile("" : "+r"(value)::"memory");
}

#define RING_OUT_16(C, i)                                                                             \
  C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7]), \
      C(d[i + 8]), C(d[i + 9]), C(d[i + 10]), C(d[i + 11]), C(d[i + 12]), C(d[i + 13]), C(d[i + 14]), \
      C(d[i + 15])
#define RING_OUT_32(C) RING_OUT_16(C, 0)
#define RING_OUT_64(C) RING_OUT_16(C, 0), RING_OUT_16(C, 16)
#define RING_OUT_96(C) RING_OUT_64(C), RING_OUT_16(C, 32)
#define RING_OUT_128(C) RING_OUT_96(C), RING_OUT_16(C, 48)
#define RING_OUT_160(C) RING_OUT_128(C), RING_OUT_16(C, 64)
#define RING_OUT_192(C) RING_OUT_160(C), RING_OUT_16(C, 80)
#define RING_LIST_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define RING_LIST_64 RING_LIST_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define RING_LIST_96 RING_LIST_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define RING_LIST_128 RING_LIST_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define RING_LIST_160 RING_LIST_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define RING_LIST_192 RING_LIST_160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define RING_FLOATS(x) "+f"(x)
#define RING_INTS(x) "+r"(x)

// d [64, kColumns] (+)= a [64, 32 bytes] b [kColumns, 32 bytes]^T
template <Format kFormat, int kColumns>
struct Wgmma;

#define RING_WGMMA(FORMAT, TYPE, C, N, K, TYPES, TAIL, A, B, P)                                         \
  template <>                                                                                           \
  struct Wgmma<FORMAT, N> {                                                                             \
    __device__ __forceinline__ static void run(TYPE (&d)[N / 2], uint64_t a, uint64_t b, int add) {     \
      asm volatile("{.reg .pred p; setp.ne.b32 p, %" #P                                                 \
                   ", 0;\n"                                                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #N K TYPES " {" RING_LIST_##N "}, %" #A ", %" #B \
                                                                                     ", p" TAIL ";}"    \
                   : RING_OUT_##N(C)                                                                    \
                   : "l"(a), "l"(b), "r"(add));                                                         \
    }                                                                                                   \
  };
#define RING_WGMMA_ALL(...)                  \
  RING_WGMMA_N(32, 16, 17, 18, __VA_ARGS__)  \
  RING_WGMMA_N(64, 32, 33, 34, __VA_ARGS__)  \
  RING_WGMMA_N(96, 48, 49, 50, __VA_ARGS__)  \
  RING_WGMMA_N(128, 64, 65, 66, __VA_ARGS__) \
  RING_WGMMA_N(160, 80, 81, 82, __VA_ARGS__) \
  RING_WGMMA_N(192, 96, 97, 98, __VA_ARGS__)
#define RING_WGMMA_N(N, A, B, P, FORMAT, TYPE, C, K, TYPES, TAIL) \
  RING_WGMMA(FORMAT, TYPE, C, N, K, TYPES, TAIL, A, B, P)

RING_WGMMA_ALL(Format::kFp8, float, RING_FLOATS, "k32", ".f32.e4m3.e4m3", ", 1, 1")
RING_WGMMA_ALL(Format::kInt8, int32_t, RING_INTS, "k32", ".s32.s8.s8", "")
RING_WGMMA_ALL(Format::kBFloat16, float, RING_FLOATS, "k16", ".f32.bf16.bf16", ", 1, 1, 0, 0")
RING_WGMMA_ALL(Format::kFloat16, float, RING_FLOATS, "k16", ".f32.f16.f16", ", 1, 1, 0, 0")

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count));
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

__device__ __forceinline__ void copy_2d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
__device__ __forceinline__ void copy_5d(void* to, const CUtensorMap* map, uint64_t* barrier, int x, int w,
                                        int v) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %6, %6, "
      "%4, %5}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(w), "r"(v), "r"(0)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Transpose an 8 x 8 matrix of 16-bit numbers that lies over a warp as the accumulators do.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

}  // namespace ringkernels::grouped
