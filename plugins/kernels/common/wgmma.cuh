// Instructions of Hopper (sm_90a): warpgroup matrix products, shared-memory descriptors, barriers between
// warps.
#pragma once

#include <cstdint>

#include "common/mma_tile.cuh"
#include "common/vec.cuh"

// 90a code only: other architectures compile these kernels to a trap, and their host never launches them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define RING_HAS_WGMMA 1
#else
#define RING_HAS_WGMMA 0
#endif

namespace ringkernels {
namespace warpgroup {

using mma_tile::shared_address;

// A tile of rows of 128 bytes, 16-byte units XORed with the row (128-byte swizzle), at a multiple of 1024
// bytes. Its descriptor serves both ways of reading: rows of the product along the tile's rows, where `next`
// is not used, or along its 64 columns, where the next 64 are `next` bytes further.
constexpr uint64_t kTileLayout = uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32;  // the swizzle; eight rows
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t next = 16) {
  return kTileLayout | (uint64_t{next >> 4} << 16) | ((address & 0x3FFFF) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of accumulators across a wait or a fence.
template <int kSize>
__device__ __forceinline__ void pin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int kSize>
__device__ __forceinline__ void pin(int32_t (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// ---- products of two tiles in shared memory, 32 bytes of each row

template <Format kFormat>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<Format::kInt8> {
  using type = int32_t;
};

#define RING_OUT_8(C) C(d[0]), C(d[1]), C(d[2]), C(d[3])
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
#define RING_LIST_8 "%0,%1,%2,%3"
#define RING_LIST_32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define RING_LIST_64 RING_LIST_32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define RING_LIST_96 RING_LIST_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define RING_LIST_128 RING_LIST_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define RING_LIST_160 RING_LIST_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define RING_LIST_192 RING_LIST_160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define RING_FLOATS(x) "+f"(x)
#define RING_INTS(x) "+r"(x)

// d [64, kColumns] = a [64, 32 bytes] b [kColumns, 32 bytes]^T (+ d if `add` is not 0), a and b behind
// descriptors.
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
  RING_WGMMA_N(8, 4, 5, 6, __VA_ARGS__)      \
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

template <typename T>
constexpr Format kFormatOf = DTypeOf<T>::value == DType::kBFloat16 ? Format::kBFloat16 : Format::kFloat16;

// ---- products of 16-bit numbers whose left operand is in registers

#define RING_WGMMA_RS_64(type, d, a, b, add, transposed)                                                \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                       \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                  \
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31])                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(transposed))

#define RING_WGMMA_RS_128(type, d, a, b, add, transposed)                                               \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                      \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                  \
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n"                                                \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),      \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),      \
        "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),      \
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),      \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(transposed))

// d [64, 64] = a b^T, b with k along its rows.
template <typename T>
__device__ __forceinline__ void wgmma_registers_rows(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                                     bool add) {
  if constexpr (kFormatOf<T> == Format::kBFloat16)
    RING_WGMMA_RS_64("bf16", d, a, b, add, 0);
  else
    RING_WGMMA_RS_64("f16", d, a, b, add, 0);
}
// d [64, 128] = a b^T (+ d), b with k along its rows.
template <typename T>
__device__ __forceinline__ void wgmma_registers_rows(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                                     bool add) {
  if constexpr (kFormatOf<T> == Format::kBFloat16)
    RING_WGMMA_RS_128("bf16", d, a, b, add, 0);
  else
    RING_WGMMA_RS_128("f16", d, a, b, add, 0);
}
// d [64, 128] += a b, b with k down its rows.
template <typename T>
__device__ __forceinline__ void wgmma_registers_columns(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (kFormatOf<T> == Format::kBFloat16)
    RING_WGMMA_RS_128("bf16", d, a, b, 1, 1);
  else
    RING_WGMMA_RS_128("f16", d, a, b, 1, 1);
}

// ---- between warps

// Ordinary writes to shared memory before this are seen by wgmma after the next barrier.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers in shared memory, by address or by pointer.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  barrier_init(shared_address(barrier), arrivals);
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) { barrier_arrive(shared_address(barrier)); }
// Arrives and expects bytes of bulk copies.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Two forms of one loop: with the other's, ptxas makes longer code of the kernels that use either.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
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

// Whether barrier_wait() would return at once.
__device__ __forceinline__ bool barrier_test(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Barrier `id` among `threads` threads of the block.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A ring of kStages tiles in shared memory: one warpgroup fills it, others use it. full, empty: kStages
// barriers each, of 128 arrivals and of one for each warp that uses the tiles.
template <int kStages>
struct TileRing {
  uint32_t full;
  uint32_t empty;

  // The copying warpgroup, as long as more(tile): load(tile, stage) starts its copies. It announces a tile
  // kLag tiles later, when they have arrived. Two stages less than the ring: those who compute look one tile
  // ahead before they release the one they work on.
  template <typename More, typename Load>
  __device__ __forceinline__ void produce_while(const More& more, const Load& load) const {
    constexpr int kLag = kStages - 2;
    static_assert(kLag > 0, "a stage to look ahead, one to work on, and one to fill");
    int after = 0;  // turns after the last tile: it is announced in the last of them
    for (int tile = 0; after < kLag; ++tile) {
      if (after == 0 && more(tile)) {
        barrier_wait(empty + 8 * (tile % kStages), (tile / kStages & 1) ^ 1);
        load(tile, tile % kStages);
      } else {
        ++after;
      }
      mma_tile::copy_commit();
      if (tile >= kLag) {
        mma_tile::copy_wait<kLag>();
        fence_proxy();
        barrier_arrive(full + 8 * ((tile - kLag) % kStages));
      }
    }
  }
  template <typename Load>
  __device__ __forceinline__ void produce(int tiles, const Load& load) const {
    produce_while([&](int tile) { return tile < tiles; }, load);
  }
  __device__ __forceinline__ void wait(int tile) const {
    barrier_wait(full + 8 * (tile % kStages), tile / kStages & 1);
  }
  __device__ __forceinline__ void release(int tile) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * (tile % kStages));
  }
};

}  // namespace warpgroup
}  // namespace ringkernels
