// Bulk tensor copies of sm_90a into shared memory; their bytes arrive at a barrier: see barrier_expect().
#pragma once

#include <cuda.h>

#include "common/wgmma.cuh"

namespace ringkernels {
namespace warpgroup {

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

}  // namespace warpgroup
}  // namespace ringkernels
