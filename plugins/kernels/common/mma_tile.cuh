// Tiles in shared memory as ldmatrix reads them, pairs of 16-bit numbers, and the 16 x 8 x 16 tensor-core
// product: for kernels that run on any GPU from sm_80 on.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace ringkernels {
namespace mma_tile {

// Byte offset of a 16-byte unit in a tile of kUnits units per row; the XOR keeps ldmatrix free of bank
// conflicts.
template <int kUnits>
__device__ __forceinline__ uint32_t tile_offset(int row, int unit) {
  return row * (kUnits * 16) + ((unit ^ (row & 7)) << 4);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool valid) {
  // Bytes that are not copied become zero.
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The 16 x 16 block at (row, 8 * unit) of a tile, in the four ways an mma takes it.
template <int kUnits>
struct Block {
  // A[m][k] with m down the tile.
  __device__ static void rows_as_a(uint32_t (&r)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % 32;
    load_matrices(r, tile + tile_offset<kUnits>(row + (lane & 15), unit + (lane >> 4)));
  }
  // B[k][n] with n down the tile: r[0], r[1] for n < 8 and r[2], r[3] for the rest.
  __device__ static void rows_as_b(uint32_t (&r)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % 32;
    load_matrices(r,
                  tile + tile_offset<kUnits>(row + (lane & 7) + (lane >> 4) * 8, unit + ((lane >> 3) & 1)));
  }
  // B[k][n] with k down the tile.
  __device__ static void columns_as_b(uint32_t (&r)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(r, tile + tile_offset<kUnits>(row + (lane & 15), unit + (lane >> 4)));
  }
  // A[m][k] with k down the tile.
  __device__ static void columns_as_a(uint32_t (&r)[4], uint32_t tile, int row, int unit) {
    const int lane = threadIdx.x % 32;
    load_matrices_transposed(
        r, tile + tile_offset<kUnits>(row + (lane & 7) + (lane >> 4) * 8, unit + ((lane >> 3) & 1)));
  }
};

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  __device__ static type from_floats(float low, float high) { return __floats2bfloat162_rn(low, high); }
};
template <>
struct Pair<__half> {
  using type = __half2;
  __device__ static type from_floats(float low, float high) { return __floats2half2_rn(low, high); }
};

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const auto pair = Pair<T>::from_floats(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// d += a b, a 16 x 16 by 16 x 8 product.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace mma_tile
}  // namespace ringkernels
