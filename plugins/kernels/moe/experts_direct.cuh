// Experts for up to 8 tokens, without sorting: one block per (token, choice) and 16 rows finds the other
// tokens of its expert by itself; the second product is per token, its warps are the token's experts.
#pragma once

#include "moe/experts_stage.cuh"

namespace ringkernels::moe {

constexpr int kGateUpRegisters = 48;  // five blocks of 8 warps fit a multiprocessor: all of one token at once
constexpr int kMaxGateUpWarps = 16;
constexpr int kMaxDownWarps = 24;
constexpr int kDownSteps = 2;  // that a warp of the second product has under way

// Pairs of `expert` among ids[0, pairs): lane n gets the n-th from `pair` on, up to `slots`. Returns how
// many, or 0 if they belong to the block of an earlier pair. One warp.
__device__ __forceinline__ int find_pairs(const int32_t* ids, int pairs, int pair, int expert, int slots,
                                          int& mine) {
  const int lane = threadIdx.x % 32;
  int rank = 0, count = 0;
#pragma unroll 2
  for (int base = 0; base < pairs; base += 32) {
    const bool same = base + lane < pairs && __ldcg(ids + base + lane) == expert;
    const unsigned mask = __ballot_sync(kFullWarp, same);
    const int before = min(32, max(0, pair - base));
    const unsigned earlier = before == 32 ? mask : mask & ((1u << before) - 1);
    rank += __popc(earlier);
    for (unsigned rest = mask & ~earlier; rest != 0 && count < slots; rest &= rest - 1) {
      if (lane == count++) mine = base + __ffs(rest) - 1;
    }
  }
  return rank % slots == 0 ? count : 0;
}

// grid: tokens.
template <typename Format, bool kBlock>
__global__ void __launch_bounds__(kThreads)
    prepare_tokens_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan) {
  __shared__ float scratch[kReduceScratch];
  prepare_token<Format, kBlock>(p, plan, blockIdx.x, scratch, [] {
    wait_for_previous_kernel();
    allow_next_kernel();  // after the wait: the next kernel reads the ids at once
  });
}

// grid: (16-row tiles, groups of `slots` tokens of the shared expert, then pairs). Shared memory: a step of
// each warp, tokens, scales; the partial sums of a warp take the place of its weights. kStage: of a single
// token, which each block prepares while its weights come; else it was prepared by a kernel before.
template <typename Format, bool kBlock, bool kStage>
__global__ void __maxnreg__(kGateUpRegisters)
    direct_gate_up_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan,
                          int slots) {
  extern __shared__ __align__(16) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int choices = choices_of(p), shared_groups = has_shared(p) ? (p.tokens + slots - 1) / slots : 0;
  const bool is_shared = (int)blockIdx.y < shared_groups;
  const int pair = (int)blockIdx.y - shared_groups;
  const int pitch = token_pitch(Format::kType, p.hidden_size), scales = kBlock ? blocks_of(p.hidden_size) : 1;
  uint8_t* my_step = shared + warp * kStepBytes;
  uint8_t* staged = shared + warps * kStepBytes;
  float* token_scale = reinterpret_cast<float*>(staged + slots * pitch);

  const int row_bytes = p.hidden_size * Format::kElementBytes, segments = row_bytes / kSegmentBytes;
  const int slot = threadIdx.x / 8, output = threadIdx.x % 8;  // of the result that this thread finishes
  Matrix m;
  const uint8_t* low_row;  // row g is gate, its partner up
  bool active;
  float gate_scale = 1.0f, up_scale = 1.0f;
  int mine = blockIdx.y * slots + lane, count = min(slots, p.tokens - (int)blockIdx.y * slots);
  auto start_weights = [&] {
    const int expert = is_shared ? p.num_experts : __ldcg(p.expert_ids + pair);
    if (!is_shared && slots == 1) mine = pair, count = 1;  // each pair by itself
    if (!is_shared && slots > 1) {
      count = find_pairs(p.expert_ids, p.tokens * p.top_k, pair, expert, slots, mine);
    }
    const bool valid = is_shared || (expert >= 0 && expert < p.num_experts);
    m = matrix_of<Format>(p, valid ? expert : 0, false);
    active = valid && count > 0 && blockIdx.x * kRowTile < (unsigned)m.rows;
    low_row = m.weights + (int64_t)(blockIdx.x * kRowTile + lane / 4 * 2) * row_bytes;
    if (!active) return;
    copy_step(my_step, low_row, low_row + row_bytes, warp * kStepSegments, row_bytes);
    if (is_8bit(Format::kType) && !kBlock && slot < count) {
      gate_scale = row_scale(p, m, blockIdx.x * kRowTile + output * 2);
      up_scale = row_scale(p, m, blockIdx.x * kRowTile + output * 2 + 1);
    }
  };
  if constexpr (kStage) {
    __shared__ float scratch[kReduceScratch];
    if (is_shared) start_weights();
    auto ready = [&] {
      wait_for_previous_kernel();
      if (!is_shared) start_weights();
      allow_next_kernel();
    };
    auto* target = reinterpret_cast<typename Format::Activation*>(staged);
    stage_hidden<Format, kBlock>(
        p, 0, scratch, ready,
        [&](int k, const float (&x)[8], float divisor) { store_encoded<Format>(target + k, x, divisor); },
        [&](int block, float value) { token_scale[block] = value; });
  } else {
    // If prepare_tokens_kernel ran, it waited for the ids before it let this kernel start: weights can come
    // at once.
    if (plan.codes == nullptr) wait_for_previous_kernel();
    start_weights();
    if (plan.codes != nullptr) wait_for_previous_kernel();
    allow_next_kernel();
    const Prepared input = prepared_of<Format>(p, plan, scales);
    const int token_bytes = row_bytes_of<Format>(p.hidden_size), part = token_bytes / 8;
    for (int i = warp; active && i < count * 8; i += warps) {  // an eighth of a token, so that all warps help
      const int found = __shfl_sync(kFullWarp, mine, i / 8), token = is_shared ? found : found / p.top_k;
      copy_token<Format>(staged + i / 8 * pitch + i % 8 * part, token_scale + i / 8 * scales,
                         input.codes + (int64_t)token * token_bytes + i % 8 * part, part,
                         input.scales + (int64_t)token * input.scale_stride, i % 8 == 0 ? scales : 0,
                         input.scale_stride == 0);
    }
  }
  wait_for_copies();
  if (!active) return;
  __syncthreads();
  // This lane's token, and the two tokens of its sums. Lanes without one repeat the last: nobody reads their
  // sums.
  const uint8_t* tokens = staged + min(lane / 4, count - 1) * pitch;
  auto block_scale = [&](int, int column, int block) {
    return token_scale[min(lane % 4 * 2 + column, count - 1) * scales + block];
  };
  Sums<Format, kBlock, 1> sums;
  sums.clear();
  const BlockScales weight_scale = kBlock ? block_scales(m, blockIdx.x * kRowTile, false) : BlockScales{};
  for (int segment = warp * kStepSegments; segment < segments; segment += warps * kStepSegments) {
    sums.step(StepCopies(my_step), segment, segments, tokens, 0, 1, weight_scale, block_scale);
    if (segment + warps * kStepSegments < segments) {
      copy_step(my_step, low_row, low_row + row_bytes, segment + warps * kStepSegments, row_bytes);
      wait_for_copies();
    }
  }
  __syncwarp();
  float* partial = reinterpret_cast<float*>(my_step) + lane / 4 * kTokenTile + lane % 4 * 2;
  *reinterpret_cast<float2*>(partial) = {sums.value(0, 0), sums.value(0, 1)};
  *reinterpret_cast<float2*>(partial + 8 * kTokenTile) = {sums.value(0, 2), sums.value(0, 3)};
  __syncthreads();
  if (warp * 4 >= count) return;
  const int found = __shfl_sync(kFullWarp, mine, min(slot, count - 1));
  if (slot >= count) return;
  float gate = 0.0f, up = 0.0f;
#pragma unroll 8
  for (int w = 0; w < warps; ++w) {
    const auto* sum = reinterpret_cast<const float*>(shared + w * kStepBytes);
    gate += sum[output * kTokenTile + slot];
    up += sum[(8 + output) * kTokenTile + slot];
  }
  if constexpr (is_8bit(Format::kType) && !kBlock) {
    gate *= gate_scale * token_scale[slot];
    up *= up_scale * token_scale[slot];
  }
  const int64_t row_of_pair =
      is_shared ? (int64_t)found * choices + p.top_k : (int64_t)(found / p.top_k) * choices + found % p.top_k;
  plan.intermediate[row_of_pair * widest(p) + blockIdx.x * 8 + output] = swiglu(gate, up);
}

// grid: (16-row tiles, tokens). `parts` warps share the columns of one choice. kPrepared: the SwiGLU outputs
// were quantized by a kernel of their own; for one token each block does it, which is sooner done.
template <typename Format, bool kBlock, bool kPrepared>
__global__ void __launch_bounds__(kMaxDownWarps * 32)
    direct_down_kernel(const __grid_constant__ ExpertsParams p, const __grid_constant__ ExpertsPlan plan,
                       int parts) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float partial[kMaxDownWarps][kRowTile];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int choices = choices_of(p), token = blockIdx.y, width = widest(p);
  const int pitch = token_pitch(Format::kType, width), scales = kBlock ? blocks_of(width) : 1;
  uint8_t* my_steps = shared + warp * kDownSteps * kStepBytes;
  uint8_t* tokens = shared + warps * kDownSteps * kStepBytes + warp / parts * pitch;
  float* scale = reinterpret_cast<float*>(shared + warps * kDownSteps * kStepBytes + warps / parts * pitch) +
                 warp * scales;
  const int row = blockIdx.x * kRowTile + lane / 4;
  float total[2] = {};
  bool waited = false;
  for (int choice = warp / parts; choice < choices; choice += warps / parts) {
    // The ids were written before direct_gate_up_kernel, which waited for them before it let this kernel
    // start.
    const bool is_shared = choice == p.top_k;
    const int expert = is_shared ? p.num_experts : __ldcg(p.expert_ids + (int64_t)token * p.top_k + choice);
    const bool valid = is_shared || (expert >= 0 && expert < p.num_experts);
    const Matrix m = matrix_of<Format>(p, valid ? expert : 0, true);
    const int row_bytes = m.columns * Format::kElementBytes;
    const int steps = (segments_of(m.columns, Format::kElementBytes) + kStepSegments - 1) / kStepSegments;
    const int begin = (steps + parts - 1) / parts * (warp % parts) * kStepSegments;
    const int end = min(begin + (steps + parts - 1) / parts * kStepSegments,
                        segments_of(m.columns, Format::kElementBytes));
    const int end_bytes = valid ? min(row_bytes, end * kSegmentBytes) : 0;
    const uint8_t* low_row = m.weights + (int64_t)row * row_bytes;
    const uint8_t* high_row = low_row + 8 * (int64_t)row_bytes;
#pragma unroll
    for (int i = 0; i < kDownSteps; ++i) {
      copy_step(my_steps + i * kStepBytes, low_row, high_row, begin + i * kStepSegments, end_bytes);
    }
    const float low_scale = valid ? row_scale(p, m, row) : 0.0f,
                high_scale = valid ? row_scale(p, m, row + 8) : 0.0f;
    const float weight = is_shared ? 1.0f : __ldcg(p.routing_weights + (int64_t)token * p.top_k + choice);
    if (!waited) {
      allow_next_kernel();  // it has weights to fetch, and this one's are under way
      wait_for_previous_kernel();
    }
    waited = true;
    if (!valid || begin >= end) {
      wait_for_copies();  // zeros, that must not arrive after what the next choice copies there
      continue;
    }
    const int64_t pair = (int64_t)token * choices + choice;
    if constexpr (kPrepared) {
      const int start = begin * kTokenSegmentBytes<Format>,
                bytes = (end - begin) * kTokenSegmentBytes<Format>;
      copy_token<Format>(tokens + start, scale,
                         plan.intermediate_codes + pair * row_bytes_of<Format>(width) + start, bytes,
                         plan.intermediate_scales + pair * scales, scales, false);
    } else {
      stage_intermediate<Format, kBlock>(plan.intermediate + pair * width, m.columns,
                                         begin * kSegmentElements<Format>, end * kSegmentElements<Format>,
                                         p.down_input_scale,
                                         reinterpret_cast<typename Format::Activation*>(tokens), scale);
    }
    wait_for_copies();
    __syncwarp();
    Sums<Format, kBlock, 1> sums;
    sums.clear();
    const BlockScales weight_scale = kBlock ? block_scales(m, blockIdx.x * kRowTile, true) : BlockScales{};
    auto block_scale = [&](int, int, int block) { return scale[block]; };
    for (int s = begin; s < end; s += kDownSteps * kStepSegments) {
      if (s > begin) {
#pragma unroll
        for (int i = 0; i < kDownSteps; ++i) {
          copy_step(my_steps + i * kStepBytes, low_row, high_row, s + i * kStepSegments, end_bytes);
        }
        wait_for_copies();
      }
#pragma unroll
      for (int i = 0; i < kDownSteps; ++i) {
        sums.step(StepCopies(my_steps + i * kStepBytes), s + i * kStepSegments, end, tokens, 0, 1,
                  weight_scale, block_scale);
      }
    }
    const float factor = is_8bit(Format::kType) && !kBlock ? weight * scale[0] : weight;
    total[0] += factor * low_scale * sums.value(0, 0);
    total[1] += factor * high_scale * sums.value(0, 2);
    __syncwarp();
  }
  if (!waited) wait_for_previous_kernel();
  wait_for_copies();
  const int64_t index = (int64_t)token * p.hidden_size + blockIdx.x * kRowTile + threadIdx.x % kRowTile;
  const float before = threadIdx.x < kRowTile ? output_before(p, index) : 0.0f;
  if (lane % 4 == 0) {
    partial[warp][lane / 4] = total[0];
    partial[warp][lane / 4 + 8] = total[1];
  }
  __syncthreads();
  if (threadIdx.x >= kRowTile) return;
  float sum = 0.0f;
  for (int w = 0; w < warps; ++w) sum += partial[w][threadIdx.x];
  put_output(p, index, before + sum);
}

}  // namespace ringkernels::moe
