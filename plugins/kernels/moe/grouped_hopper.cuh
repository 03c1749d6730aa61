// The grouped product on sm_90a: one warp copies tiles through the bulk copy engine, another looks a tile
// ahead, two warpgroups multiply.
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
constexpr int kJobs = 2;  // the tile under way and the one after it
constexpr int kMaxGroups = 1025;

struct HopperMaps {
  CUtensorMap weights[2];
  CUtensorMap tokens[2];
  CUtensorMap scales[2];  // token scales of kBlock128
};

struct Job {
  TileIndex tile;
  alignas(16) float token_scale[kTokenTile];  // 1 where tokens have none
};

struct HopperShared {
  uint8_t weights[kStages][kWeightStage];  // swizzled: at multiples of 1024 bytes
  uint8_t tokens[kStages][kTokenStage];
  alignas(128) float block_scale[kStages][kTokenTile];
  Job jobs[kJobs];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t job_full[kJobs];
  uint64_t job_empty[kJobs];
  int32_t tiles[kMaxGroups + 1];
};

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

// A warp that finds each tile and its tokens' scales while the tile before it is multiplied.
__device__ __forceinline__ void look_ahead(HopperShared& shared, const Product& product) {
  constexpr int kHeld = kTokenTile / 32;
  const int lane = threadIdx.x % 32, total = shared.tiles[product.num_groups];
  int turn = 0;
  for (int index = blockIdx.x; index < total; index += gridDim.x, ++turn) {
    const TileIndex tile = find_tile(product, shared.tiles, index);
    const Side& side = product.sides[tile.side];
    const bool scaled = product.scale_kind != ScaleKind::kBlock128 && side.token_scale != nullptr;
    float held[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = 32 * i + lane;
      held[i] = !scaled ? 1.0f : column < tile.columns ? side.token_scale[tile.row + column] : 0.0f;
    }
    Job& job = shared.jobs[turn % kJobs];
    barrier_wait(&shared.job_empty[turn % kJobs], (turn / kJobs & 1) ^ 1);
    if (lane == 0) job.tile = tile;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) job.token_scale[32 * i + lane] = held[i];
    barrier_arrive(&shared.job_full[turn % kJobs]);
  }
}

// What a thread of a consumer knows of its tile: its rows are g and g + 8 of the 16 of its warp.
struct Place {
  int sixteenth;  // which 16 weight rows of the group
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
  constexpr float kLog2E = 1.4426950408889634f;
  float power, sigmoid;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-kLog2E * gate));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigmoid) : "f"(1.0f + power));
  return gate * sigmoid * up;
}

// Without a branch around each store.
__device__ __forceinline__ void store_if(bool inside, uint16_t* to, uint32_t value) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.b32 [%1], %2;}" ::"r"(int{inside}), "l"(to),
               "r"(value)
               : "memory");
}
__device__ __forceinline__ void store_if(bool inside, uint16_t* to, uint32_t first, uint32_t second) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3};}" ::"r"(int{inside}),
               "l"(to), "r"(first), "r"(second)
               : "memory");
}

// sums [kCount]: of column 8 j + 2 t + c, rows g (4 j + c) and g + 8 (4 j + 2 + c), t = lane % 4.
template <bool kSwiGlu, typename Sum, int kCount>
__device__ __forceinline__ void store_tile(const Product& product, const Side& side, const TileIndex& tile,
                                           const Place& place, const float* token_scale, float2 row_scale,
                                           const Sum (&sums)[kCount]) {
  const int g = place.lane >> 2, t = place.lane & 3;
  const int width = kSwiGlu ? side.weight_rows / 2 : side.weight_rows;
  const int channel = place.sixteenth * (kSwiGlu ? 8 : 16) + t * (kSwiGlu ? 2 : 4);
  const int columns = channel < width ? tile.columns - g : 0;  // of the thread's own
  uint16_t* output =
      static_cast<uint16_t*>(side.output) + static_cast<int64_t>(tile.row + g) * width + channel;
  constexpr int kBatch = 4;  // transposed before the first of them is stored
#pragma unroll
  for (int first = 0; first < kCount / 4; first += kBatch) {
    uint32_t pairs[kBatch][2];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int j = first + i;
      const float2 scale = *reinterpret_cast<const float2*>(token_scale + 8 * j + 2 * t);
      const float a0 = static_cast<float>(sums[4 * j]) * (scale.x * row_scale.x);
      const float a1 = static_cast<float>(sums[4 * j + 1]) * (scale.y * row_scale.x);
      const float b0 = static_cast<float>(sums[4 * j + 2]) * (scale.x * row_scale.y);
      const float b1 = static_cast<float>(sums[4 * j + 3]) * (scale.y * row_scale.y);
      if constexpr (kSwiGlu) {
        pairs[i][0] = transpose(pack(swiglu(a0, b0), swiglu(a1, b1), product.half));
      } else {
        pairs[i][0] = transpose(pack(a0, a1, product.half));
        pairs[i][1] = transpose(pack(b0, b1, product.half));
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool inside = 8 * (first + i) < columns;
      uint16_t* to = output + 8 * (first + i) * static_cast<int64_t>(width);
      if constexpr (kSwiGlu) {
        store_if(inside, to, pairs[i][0]);
      } else {
        store_if(inside, to, pairs[i][0], pairs[i][1]);
      }
    }
  }
}

// Scales of the tile's weight rows along the sum (kBlock128): of gate and up, or twice that of all rows.
struct BlockScales {
  const float* weights;  // [sum blocks]
  int other;             // from a gate's scale to its up's, or 0

  __device__ __forceinline__ float2 at(int step) const {
    return make_float2(weights[step], weights[step + other]);
  }
};

// promoted += sums, those of kBlock128 after their scales.
template <bool kBlockScale, int kCount>
__device__ __forceinline__ void promote(float (&promoted)[kCount], const float (&sums)[kCount],
                                        float2 weight_scale, const float* token_scale) {
  if constexpr (kBlockScale) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      const float2 scale = *reinterpret_cast<const float2*>(token_scale + 8 * j);
      promoted[4 * j] += sums[4 * j] * (scale.x * weight_scale.x);
      promoted[4 * j + 1] += sums[4 * j + 1] * (scale.y * weight_scale.x);
      promoted[4 * j + 2] += sums[4 * j + 2] * (scale.x * weight_scale.y);
      promoted[4 * j + 3] += sums[4 * j + 3] * (scale.y * weight_scale.y);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) promoted[i] += sums[i];
  }
}

// The stages as one consumer sees them. Descriptors are kept from stage to stage, and a stage is looked at
// before it is needed: a consumer has nothing under way while it finds its next one.
struct Stages {
  HopperShared& shared;
  uint32_t weights;  // low words of the first stage's descriptors
  uint32_t tokens;
  PipelineState pipe;
  bool ready = false;

  __device__ __forceinline__ Stages(HopperShared& shared, int warpgroup)
      : shared(shared),
        weights(static_cast<uint32_t>(
            tile_descriptor(shared_address(shared.weights[0]) + warpgroup * 64 * kSumBytes))),
        tokens(static_cast<uint32_t>(tile_descriptor(shared_address(shared.tokens[0])))) {}

  __device__ __forceinline__ void look() { ready = barrier_test(&shared.full[pipe.stage], pipe.phase); }
  __device__ __forceinline__ void wait() const {
    if (!ready) barrier_wait(&shared.full[pipe.stage], pipe.phase);
  }
  // Starts the product of the stage, 32 bytes of each row at a time, and goes to the next one.
  template <Format kFormat, int kColumns, typename Sum>
  __device__ __forceinline__ void start(Sum (&sums)[kColumns / 2], bool add) {
    const uint32_t a = weights + pipe.stage * (kWeightStage >> 4),
                   b = tokens + pipe.stage * (kTokenStage >> 4);
    pin(sums);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSumBytes / 32; ++k)
      Wgmma<kFormat, kColumns>::run(sums, kTileLayout | (a + 2 * k), kTileLayout | (b + 2 * k), add || k > 0);
    wgmma_commit();
    pipe.advance();
  }
  __device__ __forceinline__ void release(int stage) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[stage]);
  }
};

// Hopper sums FP8 products in about 14 bits: every 128 of them are added to fp32 sums, while the tensor cores
// multiply for the other warpgroup.
template <bool kBlockScale, int kColumns>
__device__ __forceinline__ void sum_promoted(Stages& stages, int steps, const BlockScales& scales,
                                             float (&promoted)[kColumns / 2]) {
#pragma unroll
  for (float& value : promoted) value = 0.0f;
  stages.look();
  for (int step = 0; step < steps; ++step) {
    float sums[kColumns / 2];
    const int stage = stages.pipe.stage;
    const float* token_scale = stages.shared.block_scale[stage] + 2 * (threadIdx.x & 3);
    const float2 weight_scale = kBlockScale ? scales.at(step) : make_float2(1.0f, 1.0f);
    stages.wait();
    stages.start<Format::kFp8, kColumns>(sums, false);
    wgmma_wait<0>();
    pin(sums);
    if (!kBlockScale) stages.release(stage);
    stages.look();
    promote<kBlockScale>(promoted, sums, weight_scale, token_scale);
    if (kBlockScale) stages.release(stage);
  }
}

template <Format kFormat, int kColumns, typename Sum>
__device__ __forceinline__ void sum_plain(Stages& stages, int steps, Sum (&sums)[kColumns / 2]) {
#pragma unroll
  for (auto& sum : sums) sum = 0;
  int before = 0;
  stages.look();
  for (int step = 0; step < steps; ++step) {
    const int stage = stages.pipe.stage;
    stages.wait();
    stages.start<kFormat, kColumns>(sums, true);
    stages.look();
    wgmma_wait<1>();
    pin(sums);
    if (step > 0) stages.release(before);
    before = stage;
  }
  wgmma_wait<0>();
  pin(sums);
  stages.release(before);
}

// One tile of kSteps * 32 tokens.
template <Format kFormat, bool kBlockScale, bool kSwiGlu, int kSteps>
__device__ __forceinline__ void consume_tile(Stages& stages, const Product& product, const TileIndex& tile,
                                             const Place& place, const float* token_scale) {
  constexpr int kColumns = kSteps * kTokenStep;
  const Side& side = product.sides[tile.side];
  const int group = tile.side ? 0 : tile.group;
  int steps = ceil_div(side.sum_bytes, kSumBytes);
  asm volatile("" : "+r"(steps));  // or it is computed anew in every step
  const float2 row_scale = row_scales<kSwiGlu>(product, side, group, place);
  typename Accumulator<kFormat>::type sums[kColumns / 2];
  if constexpr (kFormat == Format::kFp8) {
    BlockScales scales = {};
    if constexpr (kBlockScale) {
      const int blocks = ceil_div(side.weight_rows / (kSwiGlu ? 2 : 1), kScaleBlock);
      const int block = tile.weight_tile * kWeightTile / (kSwiGlu ? 2 : 1) / kScaleBlock;
      scales.weights =
          side.weight_scale + static_cast<int64_t>(group * (kSwiGlu ? 2 : 1) * blocks + block) * steps;
      scales.other = kSwiGlu ? blocks * steps : 0;
    }
    sum_promoted<kBlockScale, kColumns>(stages, steps, scales, sums);
  } else {
    sum_plain<kFormat, kColumns>(stages, steps, sums);
  }
  store_tile<kSwiGlu>(product, side, tile, place, token_scale, row_scale, sums);
}

template <Format kFormat, bool kBlockScale, bool kSwiGlu>
__device__ __forceinline__ void consume(HopperShared& shared, const Product& product) {
  const int total = shared.tiles[product.num_groups];
  Stages stages(shared, __shfl_sync(0xffffffffu, threadIdx.x / 128 - 1, 0));
  int turn = 0;
  for (int index = blockIdx.x; index < total; index += gridDim.x, ++turn) {
    const Job& job = shared.jobs[turn % kJobs];
    barrier_wait(&shared.job_full[turn % kJobs], turn / kJobs & 1);
    const TileIndex tile = job.tile;
    const Place place = {tile.weight_tile * (kWeightTile / 16) + static_cast<int>(threadIdx.x - 128) / 32,
                         static_cast<int>(threadIdx.x) % 32};
#define RING_STEPS(steps)                                                                              \
  case steps:                                                                                          \
    consume_tile<kFormat, kBlockScale, kSwiGlu, steps>(stages, product, tile, place, job.token_scale); \
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
    barrier_arrive(&shared.job_empty[turn % kJobs]);
  }
}

template <Format kFormat, bool kBlockScale, bool kSwiGlu>
__global__ void __launch_bounds__(kHopperThreads, 1)
    hopper_kernel(const __grid_constant__ HopperMaps maps, const __grid_constant__ Product product) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  HopperShared& shared = *reinterpret_cast<HopperShared*>(shared_memory);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], kConsumers * 4);
    }
    for (int job = 0; job < kJobs; ++job) {
      barrier_init(&shared.job_full[job], 32);
      barrier_init(&shared.job_empty[job], kConsumers * 128);
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
    if (threadIdx.x / 32 == 1) look_ahead(shared, product);
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
  HopperMaps maps = {};  // all of them are prefetched
  const Status status = encode_maps(product, swiglu, kBlockScale, max_rows, &maps);
  if (!status.ok()) return status;
  LaunchShape shape;
  shape.grid = dim3(multiprocessors);
  shape.block = dim3(kHopperThreads);
  shape.shared_bytes = sizeof(HopperShared);
  shape.stream = stream;
  shape.programmatic = programmatic;
  return swiglu ? launch_kernel(hopper_kernel<kFormat, kBlockScale, true>, shape, maps, product)
                : launch_kernel(hopper_kernel<kFormat, kBlockScale, false>, shape, maps, product);
}

}  // namespace ringkernels::grouped
