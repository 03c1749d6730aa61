// The grouped product on every other architecture: cp.async and mma.sync, one tile of 128 weight rows by 64
// tokens after another. Sums of 8-bit products are exact (INT8) or in fp32.
#pragma once

#include "common/fp8_to_half.cuh"
#include "moe/grouped_plan.cuh"

namespace ringkernels::grouped {

constexpr int kPortableThreads = 256;
constexpr int kPortableTokens = 64;  // three passes make a tile of the plan
constexpr int kPortableStages = 3;
constexpr int kPortableSum = 64;  // bytes of a row per stage

struct PortableShared {
  uint8_t weights[kPortableStages][kWeightTile * kPortableSum];
  uint8_t tokens[kPortableStages][kPortableTokens * kPortableSum];
};

// 16-byte pieces of a row of 64 bytes, swizzled so that 8 rows of a fragment lie in different banks.
__device__ __forceinline__ int portable_place(int row, int piece) {
  return row * kPortableSum + ((piece ^ (row >> 1 & 3)) << 4);
}

__device__ __forceinline__ void copy_or_zero(void* to, const void* from, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

template <Format kFormat>
__device__ __forceinline__ void mma_16bit(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                          uint32_t b0, uint32_t b1) {
#define RING_MMA(type)                                                      \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])             \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (kFormat == Format::kBFloat16) {
    RING_MMA("bf16");
  } else {
    RING_MMA("f16");
  }
#undef RING_MMA
}

// 32 bytes of the sum. FP8 goes through fp16, exact: it serves every architecture and is no slower on most.
template <Format kFormat, typename Sum>
__device__ __forceinline__ void mma_32_bytes(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kFormat == Format::kInt8) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kFormat == Format::kFp8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      mma_16bit<kFormat>(d, fp8_pair_to_half2(a[0] >> shift & 0xffff),
                         fp8_pair_to_half2(a[1] >> shift & 0xffff), fp8_pair_to_half2(a[2] >> shift & 0xffff),
                         fp8_pair_to_half2(a[3] >> shift & 0xffff), fp8_pair_to_half2(b[0] >> shift & 0xffff),
                         fp8_pair_to_half2(b[1] >> shift & 0xffff));
    }
  } else {
    mma_16bit<kFormat>(d, a[0], a[1], a[2], a[3], b[0], b[1]);
  }
}

// Rows of the 16 of a fragment, as the tensor maps of the Hopper kernel permute them.
template <bool kSwiGlu>
__device__ __forceinline__ int weight_row(int row) {
  const int in = row & 15;
  const int real = kSwiGlu ? 2 * (in & 7) + (in >> 3) : 4 * (in >> 1 & 3) + 2 * (in >> 3) + (in & 1);
  return (row & ~15) + real;
}

template <bool kSwiGlu>
struct PortablePass {
  const Side& side;
  int64_t first_weight;  // row of the group's tile in `weights`
  int weight_limit;      // rows of the tile that exist
  int64_t first_token;
  int columns;

  __device__ __forceinline__ void copy(PortableShared& shared, int stage, int step) const {
    const int from_byte = step * kPortableSum;
    for (int i = threadIdx.x; i < kWeightTile * kPortableSum / 16; i += kPortableThreads) {
      const int row = i / (kPortableSum / 16), piece = i % (kPortableSum / 16), byte = from_byte + piece * 16;
      const int real = weight_row<kSwiGlu>(row);
      const bool valid = real < weight_limit && byte < side.sum_bytes;
      const uint8_t* from = side.weights + (first_weight + real) * side.sum_bytes + byte;
      copy_or_zero(shared.weights[stage] + portable_place(row, piece), valid ? from : side.weights, valid);
    }
    for (int i = threadIdx.x; i < kPortableTokens * kPortableSum / 16; i += kPortableThreads) {
      const int row = i / (kPortableSum / 16), piece = i % (kPortableSum / 16), byte = from_byte + piece * 16;
      const bool valid = row < columns && byte < side.sum_bytes;
      const uint8_t* from = side.tokens + (first_token + row) * side.sum_bytes + byte;
      copy_or_zero(shared.tokens[stage] + portable_place(row, piece), valid ? from : side.tokens, valid);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

__device__ __forceinline__ uint32_t pack_16(float low, float high, bool half) {
  if (half) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// A warp has 16 weight rows and all 64 tokens: sums[8 tokens][4] as mma's accumulators.
template <Format kFormat, bool kBlockScale, bool kSwiGlu>
__device__ __forceinline__ void portable_pass(PortableShared& shared, const Product& product,
                                              const TileIndex& tile, int pass) {
  using Sum = std::conditional_t<kFormat == Format::kInt8, int32_t, float>;
  const Side& side = product.sides[tile.side];
  const int group = tile.side ? 0 : tile.group, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane >> 2, t = lane & 3;
  const int steps = ceil_div(side.sum_bytes, kPortableSum);
  const PortablePass<kSwiGlu> data = {
      side, static_cast<int64_t>(group) * side.weight_rows + tile.weight_tile * kWeightTile,
      min(kWeightTile, side.weight_rows - tile.weight_tile * kWeightTile), tile.row + pass * kPortableTokens,
      min(kPortableTokens, tile.columns - pass * kPortableTokens)};
  constexpr int kPairs = kPortableTokens / 8;
  Sum sums[kPairs][4] = {};
  float scaled[kBlockScale ? kPairs : 1][4] = {};
  for (int step = 0; step < kPortableStages - 1; ++step) data.copy(shared, step, step);
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPortableStages - 2) : "memory");
    __syncthreads();
    data.copy(shared, (step + kPortableStages - 1) % kPortableStages, step + kPortableStages - 1);
    const uint8_t* weights = shared.weights[step % kPortableStages];
    const uint8_t* tokens = shared.tokens[step % kPortableStages];
#pragma unroll
    for (int k = 0; k < kPortableSum / 32; ++k) {
      uint32_t a[4], b[2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const uint32_t*>(
            weights + portable_place(warp * 16 + g + i % 2 * 8, 2 * k + i / 2) + 4 * t);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          b[i] = *reinterpret_cast<const uint32_t*>(tokens + portable_place(pair * 8 + g, 2 * k + i) + 4 * t);
        mma_32_bytes<kFormat>(sums[pair], a, b);
      }
    }
    if constexpr (kBlockScale) {
      constexpr int kStepsPerBlock = kScaleBlock / kPortableSum;
      if (step % kStepsPerBlock != kStepsPerBlock - 1 && step != steps - 1) continue;
      const int block = step / kStepsPerBlock, blocks = ceil_div(steps, kStepsPerBlock);
      const int row_blocks = ceil_div(side.weight_rows / (kSwiGlu ? 2 : 1), kScaleBlock);
      const int row_block = tile.weight_tile * kWeightTile / (kSwiGlu ? 2 : 1) / kScaleBlock;
      const float* at = side.weight_scale +
                        static_cast<int64_t>(group * (kSwiGlu ? 2 : 1) * row_blocks + row_block) * blocks;
      const float first = at[block], second = at[block + (kSwiGlu ? row_blocks * blocks : 0)];
      const float* token_scale =
          side.token_scale + static_cast<int64_t>(block) * side.scale_stride + data.first_token;
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = pair * 8 + 2 * t + i % 2;
          const float scale = column < data.columns ? token_scale[column] : 0.0f;
          scaled[pair][i] += static_cast<float>(sums[pair][i]) * (scale * (i < 2 ? first : second));
          sums[pair][i] = 0;
        }
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");  // zeros past the end
  __syncthreads();                                  // the next pass fills the stages again
  const int row = tile.weight_tile * kWeightTile + warp * 16, width = side.weight_rows / (kSwiGlu ? 2 : 1);
  const int first_row = row + weight_row<kSwiGlu>(g), second_row = row + weight_row<kSwiGlu>(g + 8);
  if (first_row >= side.weight_rows) return;
  float first = 1.0f, second = 1.0f;
  if (product.scale_kind == ScaleKind::kTensor) first = second = side.weight_scale[group];
  if (product.scale_kind == ScaleKind::kChannel) {
    first = side.weight_scale[static_cast<int64_t>(group) * side.weight_rows + first_row];
    second = side.weight_scale[static_cast<int64_t>(group) * side.weight_rows + second_row];
  }
  uint16_t* output = static_cast<uint16_t*>(side.output) + data.first_token * width;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = pair * 8 + 2 * t + c;
      if (column >= data.columns) continue;
      const float scale =
          !kBlockScale && side.token_scale != nullptr ? side.token_scale[data.first_token + column] : 1.0f;
      const float a = kBlockScale ? scaled[kBlockScale ? pair : 0][c]
                                  : static_cast<float>(sums[pair][c]) * (scale * first);
      const float b = kBlockScale ? scaled[kBlockScale ? pair : 0][2 + c]
                                  : static_cast<float>(sums[pair][2 + c]) * (scale * second);
      uint16_t* to = output + static_cast<int64_t>(column) * width;
      if constexpr (kSwiGlu) {
        to[first_row / 2] = static_cast<uint16_t>(pack_16(a / (1.0f + __expf(-a)) * b, 0.0f, product.half));
      } else {
        to[first_row] = static_cast<uint16_t>(pack_16(a, 0.0f, product.half));
        to[second_row] = static_cast<uint16_t>(pack_16(b, 0.0f, product.half));
      }
    }
}

template <Format kFormat, bool kBlockScale, bool kSwiGlu>
__global__ void __launch_bounds__(kPortableThreads, 2) portable_kernel(const Product product) {
  __shared__ alignas(128) PortableShared shared;
  wait_for_previous_kernel();
  const int total = product.tiles[product.num_groups];
  for (int index = blockIdx.x; index < total; index += gridDim.x) {
    const TileIndex tile = find_tile(product, product.tiles, index);
    for (int pass = 0; pass * kPortableTokens < tile.columns; ++pass)
      portable_pass<kFormat, kBlockScale, kSwiGlu>(shared, product, tile, pass);
  }
}

template <Format kFormat, bool kBlockScale>
Status launch_portable(const Product& product, bool swiglu, int multiprocessors, bool programmatic,
                       Stream stream) {
  LaunchShape shape;
  shape.grid = dim3(2 * multiprocessors);
  shape.block = dim3(kPortableThreads);
  shape.stream = stream;
  shape.programmatic = programmatic;
  return swiglu ? launch_kernel(portable_kernel<kFormat, kBlockScale, true>, shape, product)
                : launch_kernel(portable_kernel<kFormat, kBlockScale, false>, shape, product);
}

}  // namespace ringkernels::grouped
