// The kernel: every warp streams its part of the weights through registers, tokens wait in shared memory.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/launch.cuh"
#include "projection/output.cuh"
#include "projection/stage.cuh"

namespace ringkernels {

__device__ __forceinline__ void copy_async(char* shared, const char* global) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;"
               :
               : "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global)
               : "memory");
}

__device__ __forceinline__ void copy_async_word(char* shared, const float* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"((unsigned)__cvta_generic_to_shared(shared)), "l"(global)
               : "memory");
}

// Wait until at most `pending` of the groups of copies that this thread has committed are still under way.
__device__ __forceinline__ void wait_copies(int pending) {
  static_assert(kMaxDepth == 4);
  switch (pending) {
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 0;" ::: "memory"); break;
  }
}

// Steps that warp `split_index` of a split has in a chunk.
__device__ __forceinline__ int steps_of(const ProjectionPlan& plan, int tile, int chunk, int split_index) {
  if (tile >= plan.row_tiles) return 0;
  return max(
      0, min(plan.warp_steps, plan.total_steps - chunk * plan.chunk_steps - split_index * plan.warp_steps));
}

// Keeps plan.depth steps of a warp's weights under way into its ring in shared memory: through its chunks of
// k and its row tiles without a break. A slot holds 16 rows of 128 bytes for each row tile; the halves of odd
// rows are swapped, so that lanes that read 64 bytes of two neighbouring rows find them in different banks.
template <typename Operand, int kRowTiles, bool kBlockScale>
class Feeder {
 public:
  static constexpr int kSlotBytes = ring_slot_bytes(kRowTiles, kBlockScale);

  __device__ __forceinline__ Feeder(const ProjectionParams& p, const ProjectionPlan& plan, char* ring,
                                    int tile, int split_index, int tile_stride)
      : p_(p), plan_(plan), ring_(ring), tile_(tile), split_index_(split_index), tile_stride_(tile_stride) {
    aim();
  }

  __device__ __forceinline__ void issue() {
    if (left_ == 0 && tile_ < plan_.row_tiles) advance();
    if (left_ > 0) {
      const int lane = threadIdx.x % 32, row = lane / 8, piece = lane % 8;
      char* slot = ring_ + slot_ * kSlotBytes + row * kStepBytes + (piece ^ row % 2 * 4) * 16;
      const int64_t stride = (int64_t)p_.k * Operand::kBytes * 4;
      const bool inside = 2 * step_ + piece / 4 < plan_.total_planes;
#pragma unroll
      for (int r = 0; r < kRowTiles * 4; ++r) {
        if (r >= 4 && (tile_ * kRowTiles + 1) * 16 >= p_.n) break;
        if (inside) copy_async(slot + r * 4 * kStepBytes, source_ + r * stride);
      }
      if (kBlockScale) {
        const int columns = (p_.k + kScaleBlock - 1) / kScaleBlock;
        copy_async_word(ring_ + slot_ * kSlotBytes + kRowTiles * 2048 + lane * 4,
                        p_.weight_scale + tile_ * kRowTiles * 16 / kScaleBlock * columns + step_);
      }
      ++step_;
      source_ += kStepBytes;
      --left_;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    slot_ = slot_ + 1 == plan_.depth ? 0 : slot_ + 1;
  }

 private:
  __device__ __forceinline__ void aim() {
    step_ = chunk_ * plan_.chunk_steps + split_index_ * plan_.warp_steps;
    source_ = static_cast<const char*>(p_.weight) + step_ * kStepBytes + threadIdx.x % 8 * 16 +
              (int64_t)(tile_ * kRowTiles * 16 + threadIdx.x % 32 / 8) * p_.k * Operand::kBytes;
    left_ = steps_of(plan_, tile_, chunk_, split_index_);
  }
  __device__ __forceinline__ void advance() {
    do {
      if (++chunk_ == plan_.chunks) {
        chunk_ = 0;
        tile_ += tile_stride_;
      }
      aim();
    } while (left_ == 0 && tile_ < plan_.row_tiles);
  }

  const ProjectionParams& p_;
  const ProjectionPlan& plan_;
  char* ring_;
  const char* source_;
  int tile_;
  int split_index_;
  int tile_stride_;
  int chunk_ = 0;
  int step_;
  int left_;
  int slot_ = 0;
};

// Scales of rows lane / 4 and 8 further of a row tile; asked for long before they are needed.
template <typename Operand, bool kBlockScale>
__device__ __forceinline__ float2 load_row_scale(const ProjectionParams& p, int row_tile) {
  if (!Operand::kQuantized || kBlockScale) return make_float2(1.0f, 1.0f);
  if (p.weight_scale_kind == ScaleKind::kTensor) return make_float2(*p.weight_scale, *p.weight_scale);
  const int row = row_tile * 16 + threadIdx.x % 32 / 4;
  if (row >= p.n) return make_float2(1.0f, 1.0f);
  return make_float2(__ldg(p.weight_scale + row), __ldg(p.weight_scale + row + 8));
}

// The four sums of a lane: rows `row` and `row` + 8, two tokens.
template <typename Operand, bool kBlockScale, typename Total>
__device__ __forceinline__ void store_four(const ProjectionParams& p, const float* token_scale,
                                           float2 row_scale, int row, int token, const Total (&y)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (token + j % 2 >= p.m) continue;
    const int n = row + j / 2 * 8;
    float factor = Operand::gain();
    if (Operand::kQuantized && !kBlockScale)
      factor *= token_scale[token + j % 2] * (j < 2 ? row_scale.x : row_scale.y);
    store_output(p, token + j % 2, n, (float)y[j] * factor);
  }
}

// Sum what the warps of a split have left of each row tile, in a fixed order, and store it.
template <typename Operand, int kTokenTiles, int kRowTiles, int kWarps, bool kBlockScale, typename Total>
__device__ __forceinline__ void store_split(const ProjectionParams& p, const ProjectionPlan& plan,
                                            const float* token_scale, const float2* row_scales,
                                            const Total* sums, int first_tile) {
  struct alignas(16) Four {
    Total value[4];
  };
  const int split = 1 << plan.log_split, teams = kWarps >> plan.log_split;
  constexpr int kTileItems = kRowTiles * kTokenTiles * 32;
  for (int item = threadIdx.x; item < teams * kTileItems; item += kWarps * 32) {
    const int team = item / kTileItems, within = item % kTileItems;
    const int lane = within % 32, token_tile = within / 32 % kTokenTiles,
              row_tile = within / 32 / kTokenTiles;
    const int row = ((first_tile + team) * kRowTiles + row_tile) * 16 + lane / 4;
    const int token = token_tile * 8 + lane % 4 * 2;
    if (row >= p.n || token >= p.m) continue;
    Total y[4] = {};
    const auto* part = reinterpret_cast<const Four*>(sums) + (team << plan.log_split) * kTileItems + within;
#pragma unroll 4
    for (int i = 0; i < split; ++i) {
      const Four four = part[i * kTileItems];
#pragma unroll
      for (int j = 0; j < 4; ++j) y[j] += four.value[j];
    }
    store_four<Operand, kBlockScale>(p, token_scale, row_scales[(team * kRowTiles + row_tile) * 8 + lane / 4],
                                     row, token, y);
  }
}

template <bool kSecond, typename A, typename B>
__device__ __forceinline__ auto& pick(A& a, B& b) {
  if constexpr (kSecond)
    return b;
  else
    return a;
}

// total += sum * the scales of a block of 128; sum starts anew.
template <int kTokenTiles, int kRowTiles, typename Sum>
__device__ __forceinline__ void add_block(Sum (&sum)[kRowTiles][kTokenTiles][4],
                                          float (&total)[kRowTiles][kTokenTiles][4], const float* token_scale,
                                          int m, float weight_scale) {
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const int token = j * 8 + threadIdx.x % 4 * 2;
    const float even = token_scale[min(token, m - 1)] * weight_scale;
    const float odd = token_scale[min(token + 1, m - 1)] * weight_scale;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[r][j][i] = fmaf((float)sum[r][j][i], i % 2 == 0 ? even : odd, total[r][j][i]);
        sum[r][j][i] = 0;
      }
  }
}

// All tokens times the rows of one plane.
template <typename Operand, int kTokenTiles, int kRowTiles>
__device__ __forceinline__ void multiply_plane(typename Operand::Sum (&sum)[kRowTiles][kTokenTiles][4],
                                               const uint4 (&rows)[kRowTiles][2], const char* tokens,
                                               const int (&lane_tokens)[kTokenTiles]) {
  static_assert(kRowTiles <= 2);
  const typename Operand::Rows first(rows[0][0], rows[0][1]),
      last(rows[kRowTiles - 1][0], rows[kRowTiles - 1][1]);
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    const typename Operand::Tokens b(*reinterpret_cast<const uint4*>(tokens + lane_tokens[j]));
    Operand::multiply(sum[0][j], first, b);
    if constexpr (kRowTiles == 2) Operand::multiply(sum[1][j], last, b);
  }
}

template <typename Operand, int kTokenTiles, int kRowTiles, int kWarps, int kBlocks, int kHeld,
          bool kBlockScale>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    projection_kernel(const __grid_constant__ ProjectionParams p,
                      const __grid_constant__ ProjectionPlan plan) {
  using Sum = typename Operand::Sum;
  using Total = std::conditional_t<kBlockScale, float, Sum>;
  using WeightFeeder = Feeder<Operand, kRowTiles, kBlockScale>;
  constexpr int kThreads = kWarps * 32, kBatch = kTokenTiles == 8 ? 8 : 4;
  extern __shared__ __align__(16) char shared[];
  StageBuffers staged;
  staged.tokens = shared;
  staged.token_scale = reinterpret_cast<float*>(shared + plan.tokens_bytes);
  staged.partials = reinterpret_cast<float2*>(shared + plan.tokens_bytes + plan.scales_bytes);
  char* const sums = shared + plan.tokens_bytes + plan.scales_bytes + plan.stats_bytes;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, teams = kWarps >> plan.log_split;
  const int split_index = warp & ((1 << plan.log_split) - 1), tile_stride = gridDim.x * teams;
  int tile = blockIdx.x * teams + (warp >> plan.log_split);
  auto* const row_scales = reinterpret_cast<float2*>(sums + plan.sums_bytes - kWarps * kRowTiles * 64);
  char* const ring = sums + plan.sums_bytes + warp * plan.depth * WeightFeeder::kSlotBytes;
  WeightFeeder feeder(p, plan, ring, tile, split_index, tile_stride);
#pragma unroll 1
  for (int i = 0; i < plan.early; ++i) feeder.issue();
  const auto issue_rest = [&] {
#pragma unroll 1
    for (int i = plan.early; i < plan.depth; ++i) feeder.issue();
  };

  wait_for_previous_kernel();
  allow_next_kernel();
  const bool raw = is_raw<Operand>(p);
  if (raw) {
    stage_raw<Operand, kThreads, kBatch, kBlockScale>(p, plan, 0, staged, issue_rest);
  } else if (plan.held) {
    stage_held<Operand, kThreads, kHeld, kBlockScale>(p, plan, staged, issue_rest);
  } else {
    issue_rest();
    if (plan.stats_bytes > 0) measure_tokens<kThreads>(p, plan, staged);
  }
  __syncthreads();

  int lane_tokens[kTokenTiles];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j)
    lane_tokens[j] = min(j * 8 + lane / 4, p.m - 1) * kPlaneBytes + lane % 4 * 16;
  Sum sum[kRowTiles][kTokenTiles][4] = {};
  [[maybe_unused]] float total[kRowTiles][kTokenTiles][4] = {};
  bool ready = raw || plan.held;  // the first chunk is staged
  int slot = 0;
  for (int block_tile = blockIdx.x * teams; block_tile < plan.row_tiles; block_tile += tile_stride) {
    float2 row_scale[kRowTiles];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
      row_scale[r] = load_row_scale<Operand, kBlockScale>(p, tile * kRowTiles + r);
    for (int chunk = 0; chunk < plan.chunks; ++chunk) {
      if (!ready) {
        if (raw)
          stage_raw<Operand, kThreads, kBatch, kBlockScale>(p, plan, chunk, staged, [] {});
        else
          stage_values<Operand, kThreads, kBlockScale>(p, plan, chunk, staged);
        __syncthreads();
      }
      const int steps = steps_of(plan, tile, chunk, split_index);
      int local_step = split_index * plan.warp_steps;
      const int planes = plan.total_planes - chunk * plan.chunk_steps * 2;
#pragma unroll 1
      for (int i = 0; i < steps; ++i, ++local_step) {
        wait_copies(plan.depth - 1);
        __syncwarp();
        const char* weights = ring + slot * WeightFeeder::kSlotBytes + lane / 4 * kStepBytes + lane % 4 * 16;
        slot = slot + 1 == plan.depth ? 0 : slot + 1;
        [[maybe_unused]] const float weight_scale =
            kBlockScale ? *reinterpret_cast<const float*>(weights + kRowTiles * 2048 - lane / 4 * kStepBytes)
                        : 0.0f;
        uint4 rows[2][kRowTiles][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int r = 0; r < kRowTiles * 2; ++r)
            rows[half][r / 2][r % 2] = *reinterpret_cast<const uint4*>(weights + r * 8 * kStepBytes +
                                                                       (half ^ lane / 4 % 2) * kPlaneBytes);
        const char* tokens = shared + local_step * 2 * p.m * kPlaneBytes;
        multiply_plane<Operand, kTokenTiles, kRowTiles>(sum, rows[0], tokens, lane_tokens);
        if (2 * local_step + 1 < planes)
          multiply_plane<Operand, kTokenTiles, kRowTiles>(sum, rows[1], tokens + p.m * kPlaneBytes,
                                                          lane_tokens);
        if constexpr (kBlockScale)
          add_block<kTokenTiles, kRowTiles>(sum, total, staged.token_scale + local_step * p.m, p.m,
                                            weight_scale);
        __syncwarp();
        feeder.issue();
      }
      ready = plan.chunks == 1;
      if (!ready) __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        auto& value = pick<kBlockScale>(sum[r][j], total[r][j]);
        if (plan.log_split > 0) {
          uint4 four;
          memcpy(&four, value, 16);
          reinterpret_cast<uint4*>(sums)[((warp * kRowTiles + r) * kTokenTiles + j) * 32 + lane] = four;
        } else if ((tile * kRowTiles + r) * 16 < p.n) {
          store_four<Operand, kBlockScale>(p, staged.token_scale, row_scale[r],
                                           (tile * kRowTiles + r) * 16 + lane / 4, j * 8 + lane % 4 * 2,
                                           value);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = 0;
      }
    if (plan.log_split > 0) {
      if (split_index == 0 && lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
          row_scales[((warp >> plan.log_split) * kRowTiles + r) * 8 + lane / 4] = row_scale[r];
      }
      __syncthreads();
      store_split<Operand, kTokenTiles, kRowTiles, kWarps, kBlockScale>(
          p, plan, staged.token_scale, row_scales, reinterpret_cast<const Total*>(sums), block_tile);
      if (block_tile + tile_stride < plan.row_tiles) __syncthreads();
    }
    tile += tile_stride;
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
}

template <typename Operand, bool kBlockScale, int kIndex>
Status launch_shape(const ProjectionParams& params, const ProjectionPlan& plan, const LaunchShape& shape) {
  constexpr KernelShape k = kKernelShapes[kIndex];
  return launch_kernel(
      projection_kernel<Operand, k.token_tiles, k.row_tiles, k.warps, k.blocks, k.held_octets, kBlockScale>,
      shape, params, plan);
}

template <typename Operand, bool kBlockScale>
Status launch_projection(const ProjectionParams& params, const ProjectionPlan& plan,
                         const LaunchShape& shape) {
  switch (plan.shape) {
    case 0: return launch_shape<Operand, kBlockScale, 0>(params, plan, shape);
    case 1: return launch_shape<Operand, kBlockScale, 1>(params, plan, shape);
    case 2: return launch_shape<Operand, kBlockScale, 2>(params, plan, shape);
    case 3: return launch_shape<Operand, kBlockScale, 3>(params, plan, shape);
    default: return launch_shape<Operand, kBlockScale, 4>(params, plan, shape);
  }
}

using ProjectionLauncher = Status(const ProjectionParams&, const ProjectionPlan&, const LaunchShape&);
ProjectionLauncher launch_projection_fp8;
ProjectionLauncher launch_projection_fp8_block;
ProjectionLauncher launch_projection_int8;
ProjectionLauncher launch_projection_int8_block;
ProjectionLauncher launch_projection_bf16;
ProjectionLauncher launch_projection_fp16;

}  // namespace ringkernels
