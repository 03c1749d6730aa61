// The product on sm_90a: weights are the 64-row operand of wgmma, tokens its columns, and the bulk copy
// engine brings both, so that little but the bytes takes time.
//
// A block computes 64 rows, or shares their k with the other blocks of its cluster. It takes less than half
// of a multiprocessor: the block of the next kernel asks for its weights while this one ends.
#pragma once

#include <type_traits>

#include "common/bulk_copy.cuh"
#include "common/launch.cuh"
#include "projection/hopper.h"
#include "projection/output.cuh"
#include "projection/tensor_map.h"

namespace ringkernels::hopper_projection {

using namespace warpgroup;

constexpr int kRows = 64;       // of a tile
constexpr int kConsumers = 128;
constexpr int kThreads = kConsumers + 32;
constexpr int kMaxSplit = 4;
constexpr int kMaxEarly = 16;  // stages that are asked for before the kernel ahead has ended

template <int kTokens>
struct Shared {
  static constexpr int kStages = kTokens == 8 ? 12 : kTokens == 32 ? 9 : 6;
  static constexpr int kWeightBytes = kRows * kSumBytes, kTokenBytes = kTokens * kSumBytes;
  static constexpr int kPadded = kRows + 4;  // sums of a token, so that lanes hit different banks

  alignas(1024) uint8_t weights[kStages][kWeightBytes];
  uint8_t tokens[kStages][kTokenBytes];
  alignas(16) float row_scale[kRows];
  float token_scale[kTokens];
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // The sums of the block [kTokens, kPadded] lie where the weights were.
  static_assert(kTokens * kPadded * 4 <= kStages * kWeightBytes);
};

struct Maps {
  CUtensorMap weights;
  CUtensorMap tokens;
};

__device__ __forceinline__ void prefetch_2d(const CUtensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y)
               : "memory");
}

// Which part of k a block has: every block of a cluster some stages of the same rows.
struct Part {
  int tile, rank, first, count;

  __device__ __forceinline__ Part(const ProjectionParams& p, const Plan& plan) {
    tile = blockIdx.x / plan.split;
    rank = blockIdx.x % plan.split;
    first = rank * plan.block_steps;
    count = max(0, min(plan.block_steps, plan.total_steps - first));
  }
};

// What one thread asks for: weights at once, tokens when they are there.
template <int kTokens>
class Producer {
 public:
  using S = Shared<kTokens>;

  __device__ __forceinline__ Producer(S& shared, const Maps& maps, const Part& part)
      : shared_(shared), maps_(maps), part_(part), early_(min(part.count, S::kStages)) {}

  // What finds no room yet waits in the L2 cache.
  __device__ __forceinline__ void ask_early() {
    for (int i = 0; i < early_; ++i) weights(i, i);
    for (int i = early_; i < min(part_.count, kMaxEarly); ++i)
      prefetch_2d(&maps_.weights, (part_.first + i) * kSumBytes, part_.tile * kRows);
  }
  // After the wait for the kernel ahead.
  __device__ __forceinline__ void ask_rest() {
    for (int i = 0; i < early_; ++i) tokens(i, i);
    int stage = 0;
    uint32_t phase = 0;
    for (int i = early_; i < part_.count; ++i) {
      barrier_wait(&shared_.empty[stage], phase);
      weights(i, stage);
      tokens(i, stage);
      if (++stage == S::kStages) stage = 0, phase ^= 1;
    }
  }

 private:
  __device__ __forceinline__ void weights(int i, int stage) {
    barrier_expect(&shared_.full[stage], S::kWeightBytes + S::kTokenBytes);
    copy_2d(shared_.weights[stage], &maps_.weights, &shared_.full[stage], (part_.first + i) * kSumBytes,
            part_.tile * kRows);
  }
  __device__ __forceinline__ void tokens(int i, int stage) {
    copy_2d(shared_.tokens[stage], &maps_.tokens, &shared_.full[stage], (part_.first + i) * kSumBytes, 0);
  }

  S& shared_;
  const Maps& maps_;
  const Part& part_;
  int early_;
};

// Where a consumer is in the ring.
struct Ring {
  int stage = 0;     // next to be multiplied
  uint32_t phase = 0;
  int released = 0;  // next to be given back
};

// Products of the next stage, not waited for.
template <Format kFormat, int kTokens, typename Sum>
__device__ __forceinline__ void multiply(Shared<kTokens>& shared, Ring& ring, bool fresh,
                                         Sum (&sums)[kTokens / 2]) {
  barrier_wait(&shared.full[ring.stage], ring.phase);
  const uint64_t a = tile_descriptor(shared_address(shared.weights[ring.stage]));
  const uint64_t b = tile_descriptor(shared_address(shared.tokens[ring.stage]));
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSumBytes / 32; ++k)
    Wgmma<kFormat, kTokens>::run(sums, a + 2 * k, b + 2 * k, k > 0 || !fresh);
  wgmma_commit();
  if (++ring.stage == Shared<kTokens>::kStages) ring.stage = 0, ring.phase ^= 1;
}

template <int kTokens>
__device__ __forceinline__ void release(Shared<kTokens>& shared, Ring& ring) {
  if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[ring.released]);
  if (++ring.released == Shared<kTokens>::kStages) ring.released = 0;
}

__device__ __forceinline__ void wait_products(int in_flight) {  // a constant after unrolling
  switch (in_flight) {
    case 0: wgmma_wait<0>(); break;
    case 1: wgmma_wait<1>(); break;
    case 2: wgmma_wait<2>(); break;
    default: wgmma_wait<3>(); break;
  }
}

// kGroup stages, each with sums of its own, added to the total in their order.
template <Format kFormat, int kTokens, int kGroup>
__device__ __forceinline__ void multiply_group(Shared<kTokens>& shared, Ring& ring,
                                               float (&total)[kTokens / 2]) {
  float sums[kGroup][kTokens / 2];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    pin(sums[i]);
    multiply<kFormat, kTokens>(shared, ring, true, sums[i]);
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    wait_products(kGroup - 1 - i);
    pin(sums[i]);
    release(shared, ring);
#pragma unroll
    for (int e = 0; e < kTokens / 2; ++e) total[e] += sums[i][e];
  }
}

// The sums of a block: element i of a thread as wgmma leaves it.
template <Format kFormat, int kTokens>
__device__ __forceinline__ void consume(Shared<kTokens>& shared, int count,
                                        typename Accumulator<kFormat>::type (&total)[kTokens / 2]) {
  Ring ring;
#pragma unroll
  for (auto& value : total) value = 0;
  if constexpr (kFormat == Format::kFp8) {
    // Hopper sums FP8 products in about 14 bits: the sums of each stage are added to fp32 totals.
    constexpr int kGroup = kTokens == 8 ? 4 : 2;
    int step = 0;
    for (; step + kGroup <= count; step += kGroup)
      multiply_group<kFormat, kTokens, kGroup>(shared, ring, total);
    for (; step < count; ++step) multiply_group<kFormat, kTokens, 1>(shared, ring, total);
  } else {
    pin(total);
    for (int step = 0; step < count; ++step) {
      multiply<kFormat, kTokens>(shared, ring, false, total);
      if (step == 0) continue;
      wgmma_wait<1>();
      release(shared, ring);
    }
    wgmma_wait<0>();
    pin(total);
  }
}

__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// 16 bytes of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ uint4 load_remote(uint32_t address, int rank) {
  uint4 value;
  asm volatile(
      "{.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %4, %5;\n"
      "ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [remote];}"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "r"(address), "r"(rank)
      : "memory");
  return value;
}

template <typename Sum>
__device__ __forceinline__ void add(Sum (&to)[4], uint4 from) {
  const unsigned words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<Sum, float>)
      to[i] += __uint_as_float(words[i]);
    else
      to[i] += static_cast<int>(words[i]);
  }
}

// Four neighbouring rows of a token.
__device__ __forceinline__ void store_four(const ProjectionParams& p, int token, int row, float4 y) {
  const int64_t index = token * p.output_row_stride + row;
  if (p.output_dtype == DType::kFloat32) {
    auto* address = reinterpret_cast<float4*>(static_cast<float*>(p.output) + index);
    if (p.accumulate) {
      const float4 old = *address;
      y = make_float4(old.x + y.x, old.y + y.y, old.z + y.z, old.w + y.w);
    }
    *address = y;
    return;
  }
  auto* address = reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.output) + index);
  const bool half = p.output_dtype == DType::kFloat16;
  if (p.accumulate) {
    const uint2 old = *address;
    const auto pair = [half](uint32_t word) {
      return half ? __half22float2(reinterpret_cast<const __half2&>(word))
                  : __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(word));
    };
    const float2 low = pair(old.x), high = pair(old.y);
    y = make_float4(low.x + y.x, low.y + y.y, high.x + y.z, high.y + y.w);
  }
  const auto packed = [half](float a, float b) {
    const __half2 halves = __floats2half2_rn(a, b);
    const __nv_bfloat162 brains = __floats2bfloat162_rn(a, b);
    return half ? reinterpret_cast<const uint32_t&>(halves) : reinterpret_cast<const uint32_t&>(brains);
  };
  *address = make_uint2(packed(y.x, y.y), packed(y.z, y.w));
}

// Each block of a cluster finishes some of the rows: its own sums and those of the others.
template <bool kQuantized, int kTokens, typename Sum>
__device__ __forceinline__ void finish(const ProjectionParams& p, const Plan& plan, const Part& part,
                                       const Shared<kTokens>& shared, const Sum* sums) {
  const int quads = kRows / 4 / plan.split;  // of rows, for each token
  for (int item = threadIdx.x; item < p.m * quads; item += kThreads) {
    const int token = item / quads, within = (part.rank * quads + item % quads) * 4;
    const int row = part.tile * kRows + within;
    if (row >= p.n) continue;
    Sum total[4] = {};
    const Sum* own = sums + token * Shared<kTokens>::kPadded + within;
    if (plan.split == 1) add(total, *reinterpret_cast<const uint4*>(own));
    for (int i = 0; plan.split > 1 && i < plan.split; ++i)
      add(total, load_remote(shared_address(own), i));
    float4 factor = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    if (kQuantized) {
      const float scale = shared.token_scale[token];
      const float4 rows = *reinterpret_cast<const float4*>(shared.row_scale + within);
      factor = make_float4(scale * rows.x, scale * rows.y, scale * rows.z, scale * rows.w);
    }
    store_four(p, token, row,
               make_float4((float)total[0] * factor.x, (float)total[1] * factor.y, (float)total[2] * factor.z,
                           (float)total[3] * factor.w));
  }
}

// A block that has all of k, and few tokens: straight from the registers of a thread.
template <bool kQuantized, typename Sum>
__device__ __forceinline__ void finish_alone(const ProjectionParams& p, const Part& part,
                                             const Shared<8>& shared, const Sum (&total)[4]) {
  const int first = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = threadIdx.x % 4 * 2 + i % 2, within = first + i / 2 * 8;
    const int row = part.tile * kRows + within;
    if (token >= p.m || row >= p.n) continue;
    const float factor = kQuantized ? shared.token_scale[token] * shared.row_scale[within] : 1.0f;
    store_output(p, token, row, (float)total[i] * factor);
  }
}

template <Format kFormat, int kTokens>
__global__ void __launch_bounds__(kThreads, 2)
    hopper_projection_kernel(const __grid_constant__ Maps maps, const __grid_constant__ ProjectionParams p,
                             const __grid_constant__ Plan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Sum = typename Accumulator<kFormat>::type;
  using S = Shared<kTokens>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  S& shared = *reinterpret_cast<S*>(shared_memory);
  constexpr bool kQuantized = kFormat == Format::kFp8 || kFormat == Format::kInt8;
  const Part part(p, plan);
  Producer<kTokens> producer(shared, maps, part);
  if (threadIdx.x == kConsumers) {
    for (int stage = 0; stage < S::kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], kConsumers / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    producer.ask_early();
    prefetch_map(&maps.tokens);
  }
  if (kQuantized && threadIdx.x < kRows) {
    const int row = min(part.tile * kRows + (int)threadIdx.x, p.n - 1);
    shared.row_scale[threadIdx.x] = p.weight_scale[p.weight_scale_kind == ScaleKind::kTensor ? 0 : row];
  }
  __syncthreads();
  auto* const sums = reinterpret_cast<Sum*>(shared.weights);
  if (threadIdx.x >= kConsumers) {
    wait_for_previous_kernel();
    allow_next_kernel();
    if (threadIdx.x == kConsumers) producer.ask_rest();
    __syncwarp();
  } else {
    wait_for_previous_kernel();
    allow_next_kernel();
    if (kQuantized && threadIdx.x < p.m)
      shared.token_scale[threadIdx.x] = p.input_scale ? p.input_scale[threadIdx.x] : *p.static_scale;
    asm volatile("bar.sync 1, 128;" ::: "memory");  // scales are there
    Sum total[kTokens / 2];
    consume<kFormat, kTokens>(shared, part.count, total);
    if constexpr (kTokens == 8) {
      if (plan.split == 1) finish_alone<kQuantized>(p, part, shared, total);
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");  // the other warps' products have read the weights too
    const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i)
      sums[(i / 4 * 8 + column + i % 2) * S::kPadded + row + i / 2 % 2 * 8] = total[i];
  }
  if (kTokens == 8 && plan.split == 1) return;
  wait_for_previous_kernel();
  if (plan.split > 1)
    cluster_barrier();
  else
    __syncthreads();
  finish<kQuantized>(p, plan, part, shared, sums);
  if (plan.split > 1) cluster_barrier();  // the others have read this block's sums
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  __trap();  // the library must be built for 90a
#endif
}

template <Format kFormat, int kTokens>
Status launch_tokens(const ProjectionParams& params, const Plan& plan, const Maps& maps, LaunchShape shape) {
  shape.shared_bytes = sizeof(Shared<kTokens>);
  return launch_kernel(hopper_projection_kernel<kFormat, kTokens>, shape, maps, params, plan);
}

template <Format kFormat>
Status launch_format(const ProjectionParams& params, const Plan& plan, const Maps& maps, LaunchShape shape) {
  switch (plan.tokens) {
    case 8: return launch_tokens<kFormat, 8>(params, plan, maps, shape);
    case 32: return launch_tokens<kFormat, 32>(params, plan, maps, shape);
    default: return launch_tokens<kFormat, 64>(params, plan, maps, shape);
  }
}

using Launcher = Status(const ProjectionParams&, const Plan&, const Maps&, LaunchShape);
Launcher launch_fp8;
Launcher launch_int8;
Launcher launch_bf16;
Launcher launch_fp16;

}  // namespace ringkernels::hopper_projection
