// The grouped product on sm_90a: one warp copies tiles through the bulk copy engine, two warpgroups multiply.
//
// Weights are the 64-row operand. Their rows are permuted inside each 16 by the tensor map, so that a thread
// finds gate and up of a channel in its own registers (first product), or four neighbouring channels after
// the transposition of the output (second product).
#pragma once

#include "common/bulk_copy.cuh"
#include "moe/grouped_plan.cuh"

namespace ringkernels::grouped {

using namespace warpgroup;

constexpr int kStages = 5;
constexpr int kConsumers = 2;  // warpgroups of 64 weight rows each
constexpr int kHopperThreads = (kConsumers + 1) * 128;
constexpr int kWeightStage = kWeightTile * kSumBytes;
constexpr int kTokenStage = kTokenTile * kSumBytes;
constexpr int kMaxGroups = 1025;

struct HopperMaps {
  CUtensorMap weights[2];
  CUtensorMap tokens[2];
  CUtensorMap scales[2];  // token scales of kBlock128
};

struct HopperShared {
  alignas(1024) uint8_t weights[kStages][kWeightStage];
  uint8_t tokens[kStages][kTokenStage];
  alignas(128) float block_scale[kStages][kTokenTile];
  float token_scale[2][kConsumers][kTokenTile];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int32_t tiles[kMaxGroups + 1];
};
constexpr size_t kHopperSharedBytes = sizeof(HopperShared) + 1024;  // to align it

struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

template <bool kSwiGlu, bool kBlockScale>
__device__ __forceinline__ void produce(HopperShared& shared, const HopperMaps& maps,
                                        const Product& product) {
  PipelineState pipe;
  const int total = shared.tiles[product.num_groups];
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    const TileIndex tile = find_tile(product, shared.tiles, index);
    const Side& side = product.sides[tile.side];
    const int sum_steps = ceil_div(side.sum_bytes, kSumBytes);
    const int token_steps = ceil_div(tile.columns, kTokenStep);
    const int group = tile.side ? 0 : tile.group;
    const int sixteenth = group * (side.weight_rows / 16) + tile.weight_tile * (kWeightTile / 16);
    const uint32_t bytes =
        kWeightStage + token_steps * kTokenStep * kSumBytes + (kBlockScale ? kTokenTile * 4 : 0);
    for (int step = 0; step < sum_steps; ++step) {
      uint64_t* full = &shared.full[pipe.stage];
      barrier_wait(&shared.empty[pipe.stage], pipe.phase ^ 1);
      barrier_expect(full, bytes);
      copy_5d(shared.weights[pipe.stage], &maps.weights[tile.side], full, step * kSumBytes,
              kSwiGlu ? sixteenth : 0, kSwiGlu ? 0 : sixteenth);
      for (int i = 0; i < token_steps; ++i)
        copy_2d(shared.tokens[pipe.stage] + i * kTokenStep * kSumBytes, &maps.tokens[tile.side], full,
                step * kSumBytes, tile.row + i * kTokenStep);
      if constexpr (kBlockScale)
        copy_2d(shared.block_scale[pipe.stage], &maps.scales[tile.side], full, tile.row, step);
      pipe.advance();
    }
  }
}

// What a thread of a consumer knows of its tile: its rows are g and g + 8 of the 16 of its warp.
struct Place {
  int sixteenth;  // which 16 weight rows of the group
  int warpgroup;
  int lane;
};

__device__ __forceinline__ uint32_t pack(float low, float high, bool half) {
  if (half) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Scales of the thread's two weight rows; kBlock128 was applied along the sum.
template <bool kSwiGlu>
__device__ __forceinline__ float2 row_scales(const Product& product, const Side& side, int group,
                                             const Place& place) {
  if (product.scale_kind == ScaleKind::kTensor) {
    const float scale = side.weight_scale[group];
    return make_float2(scale, scale);
  }
  if (product.scale_kind != ScaleKind::kChannel) return make_float2(1.0f, 1.0f);
  const int g = place.lane >> 2;
  const int row = place.sixteenth * 16 + (kSwiGlu ? 2 * g : 4 * (g >> 1) + (g & 1));
  const int other = row + (kSwiGlu ? 1 : 2);
  const float* scales = side.weight_scale + static_cast<int64_t>(group) * side.weight_rows;
  return make_float2(row < side.weight_rows ? scales[row] : 0.0f,
                     other < side.weight_rows ? scales[other] : 0.0f);
}

// Transpose an 8 x 8 matrix of 16-bit numbers that lies over a warp as the accumulators do.
__device__ __forceinline__ uint32_t transpose(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

__device__ __forceinline__ float swiglu(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// sums [kCount]: of column 8 j + 2 t + c, rows g (4 j + c) and g + 8 (4 j + 2 + c), t = lane % 4.
template <bool kSwiGlu, typename Sum, int kCount>
__device__ __forceinline__ void store_tile(const Product& product, const Side& side, const TileIndex& tile,
                                           const Place& place, const float* token_scale, float2 row_scale,
                                           const Sum (&sums)[kCount]) {
  const int g = place.lane >> 2, t = place.lane & 3;
  const int width = kSwiGlu ? side.weight_rows / 2 : side.weight_rows;
  const int channel = place.sixteenth * (kSwiGlu ? 8 : 16) + t * (kSwiGlu ? 2 : 4);
  uint16_t* output =
      static_cast<uint16_t*>(side.output) + static_cast<int64_t>(tile.row + g) * width + channel;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    float2 scale = make_float2(1.0f, 1.0f);
    if (token_scale != nullptr) scale = *reinterpret_cast<const float2*>(token_scale + 8 * j + 2 * t);
    const float a0 = static_cast<float>(sums[4 * j]) * (scale.x * row_scale.x);
    const float a1 = static_cast<float>(sums[4 * j + 1]) * (scale.y * row_scale.x);
    const float b0 = static_cast<float>(sums[4 * j + 2]) * (scale.x * row_scale.y);
    const float b1 = static_cast<float>(sums[4 * j + 3]) * (scale.y * row_scale.y);
    const bool inside = 8 * j + g < tile.columns && channel < width;
    if constexpr (kSwiGlu) {
      const uint32_t channels = transpose(pack(swiglu(a0, b0), swiglu(a1, b1), product.half));
      if (inside) *reinterpret_cast<uint32_t*>(output + static_cast<int64_t>(8 * j) * width) = channels;
    } else {
      const uint32_t first = transpose(pack(a0, a1, product.half)),
                     second = transpose(pack(b0, b1, product.half));
      if (inside)
        *reinterpret_cast<uint2*>(output + static_cast<int64_t>(8 * j) * width) = make_uint2(first, second);
    }
  }
}

// One tile of kSteps * 32 tokens.
template <Format kFormat, bool kBlockScale, bool kSwiGlu, int kSteps>
__device__ __forceinline__ void consume_tile(HopperShared& shared, const Product& product,
                                             const TileIndex& tile, const Place& place, int parity,
                                             PipelineState& pipe) {
  constexpr int kColumns = kSteps * kTokenStep, kCount = kColumns / 2;
  // Hopper sums FP8 products in about 14 bits: every 128 of them are added to fp32 sums.
  constexpr bool kPromote = kFormat == Format::kFp8;
  typename Accumulator<kFormat>::type sums[kCount];
  if constexpr (!kPromote) {
#pragma unroll
    for (auto& sum : sums) sum = 0;
  }
  float promoted[kPromote ? kCount : 1];
#pragma unroll
  for (float& value : promoted) value = 0.0f;
  const Side& side = product.sides[tile.side];
  const int group = tile.side ? 0 : tile.group, lane = place.lane;
  const int sum_steps = ceil_div(side.sum_bytes, kSumBytes);
  const float2 row_scale = row_scales<kSwiGlu>(product, side, group, place);
  float* token_scale = shared.token_scale[parity][place.warpgroup];
  const bool scaled = !kBlockScale && side.token_scale != nullptr;
  if (scaled) {
    for (int column = threadIdx.x % 128; column < kColumns; column += 128)
      token_scale[column] = column < tile.columns ? side.token_scale[tile.row + column] : 0.0f;
  }
  const float* block_scale = nullptr;
  int other_block = 0;
  if constexpr (kBlockScale) {
    const int blocks = ceil_div(side.weight_rows / (kSwiGlu ? 2 : 1), kScaleBlock);
    const int block = tile.weight_tile * kWeightTile / (kSwiGlu ? 2 : 1) / kScaleBlock;
    block_scale =
        side.weight_scale + static_cast<int64_t>(group * (kSwiGlu ? 2 : 1) * blocks + block) * sum_steps;
    other_block = kSwiGlu ? blocks * sum_steps : 0;
  }
  for (int step = 0; step < sum_steps; ++step) {
    barrier_wait(&shared.full[pipe.stage], pipe.phase);
    const uint64_t a =
        tile_descriptor(shared_address(shared.weights[pipe.stage]) + place.warpgroup * 64 * kSumBytes);
    const uint64_t b = tile_descriptor(shared_address(shared.tokens[pipe.stage]));
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k)  // 32 bytes of each row
      Wgmma<kFormat, kColumns>::run(sums, a + 2 * k, b + 2 * k, kPromote ? k > 0 : 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(sums);
    if (!kBlockScale && lane == 0) barrier_arrive(&shared.empty[pipe.stage]);
    if constexpr (kPromote) {
      float first = 1.0f, second = 1.0f;
      const float* scales = nullptr;
      if constexpr (kBlockScale) {
        first = block_scale[step];
        second = block_scale[step + other_block];
        scales = shared.block_scale[pipe.stage] + 2 * (lane & 3);
      }
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        if constexpr (kBlockScale) {
          const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
          promoted[4 * j] += sums[4 * j] * (scale.x * first);
          promoted[4 * j + 1] += sums[4 * j + 1] * (scale.y * first);
          promoted[4 * j + 2] += sums[4 * j + 2] * (scale.x * second);
          promoted[4 * j + 3] += sums[4 * j + 3] * (scale.y * second);
        } else {
#pragma unroll
          for (int c = 0; c < 4; ++c) promoted[4 * j + c] += sums[4 * j + c];
        }
      }
      if (kBlockScale) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&shared.empty[pipe.stage]);
      }
    }
    pipe.advance();
  }
  if (scaled) asm volatile("bar.sync %0, 128;" ::"r"(place.warpgroup + 1) : "memory");
  if constexpr (kPromote) {
    store_tile<kSwiGlu>(product, side, tile, place, scaled ? token_scale : nullptr, row_scale, promoted);
  } else {
    store_tile<kSwiGlu>(product, side, tile, place, scaled ? token_scale : nullptr, row_scale, sums);
  }
}

template <Format kFormat, bool kBlockScale, bool kSwiGlu>
__device__ __forceinline__ void consume(HopperShared& shared, const Product& product) {
  PipelineState pipe;
  Place place;
  place.warpgroup = threadIdx.x / 128 - 1;
  place.lane = threadIdx.x % 32;
  const int total = shared.tiles[product.num_groups];
  int parity = 0;
  for (int index = blockIdx.x; index < total; index += gridDim.x, parity ^= 1) {
    const TileIndex tile = find_tile(product, shared.tiles, index);
    place.sixteenth = tile.weight_tile * (kWeightTile / 16) + (threadIdx.x - 128) / 32;
#define RING_STEPS(steps)                                                                           \
  case steps:                                                                                       \
    consume_tile<kFormat, kBlockScale, kSwiGlu, steps>(shared, product, tile, place, parity, pipe); \
    break
    switch (ceil_div(tile.columns, kTokenStep)) {
      RING_STEPS(1);
      RING_STEPS(2);
      RING_STEPS(3);
      RING_STEPS(4);
      RING_STEPS(5);
      RING_STEPS(6);
    }
#undef RING_STEPS
  }
}

template <Format kFormat, bool kBlockScale, bool kSwiGlu>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_kernel(const __grid_constant__ HopperMaps maps, const __grid_constant__ Product product) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ uint8_t shared_memory[];
  HopperShared& shared =
      *reinterpret_cast<HopperShared*>((reinterpret_cast<uintptr_t>(shared_memory) + 1023) & ~1023);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], kConsumers * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int side = 0; side < 2; ++side) {
      prefetch_map(&maps.weights[side]);
      prefetch_map(&maps.tokens[side]);
    }
  }
  wait_for_previous_kernel();
  allow_next_kernel();
  for (int group = threadIdx.x; group <= product.num_groups; group += kHopperThreads)
    shared.tiles[group] = product.tiles[group];
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) produce<kSwiGlu, kBlockScale>(shared, maps, product);
  } else {
    take_registers<232>();
    consume<kFormat, kBlockScale, kSwiGlu>(shared, product);
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  __trap();  // the library must be built for 90a
#endif
}

// Tensor maps are encoded for each launch: that takes a microsecond on the host and no memory on the device.
Status encode_maps(const Product& product, bool swiglu, bool block_scale, int64_t max_rows, HopperMaps* maps);

template <Format kFormat, bool kBlockScale>
Status launch_hopper(const Product& product, bool swiglu, int64_t max_rows, int multiprocessors,
                     bool programmatic, Stream stream) {
  HopperMaps maps;
  const Status status = encode_maps(product, swiglu, kBlockScale, max_rows, &maps);
  if (!status.ok()) return status;
  LaunchShape shape;
  shape.grid = dim3(multiprocessors);
  shape.block = dim3(kHopperThreads);
  shape.shared_bytes = kHopperSharedBytes;
  shape.stream = stream;
  shape.programmatic = programmatic;
  return swiglu ? launch_kernel(hopper_kernel<kFormat, kBlockScale, true>, shape, maps, product)
                : launch_kernel(hopper_kernel<kFormat, kBlockScale, false>, shape, maps, product);
}

}  // namespace ringkernels::grouped
