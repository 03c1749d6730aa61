// What the expert kernels for few tokens share: where weights and scales lie, and how tokens come into shared
// memory.
#pragma once

#include <cfloat>

#include "common/launch.cuh"
#include "moe/experts_paths.h"
#include "moe/fragments.cuh"
#include "ringkernels/moe.h"

namespace ringkernels::moe {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kStepSegments = 4;  // segments that a warp loads at once: 256 bytes of each of 16 rows

// (token, choice) pairs are numbered token * choices + choice; the last choice is the shared expert, if any.
__host__ __device__ inline bool has_shared(const ExpertsParams& p) { return p.shared_intermediate_size > 0; }
__host__ __device__ inline int choices_of(const ExpertsParams& p) {
  return p.top_k + (has_shared(p) ? 1 : 0);
}
__host__ __device__ inline int widest(const ExpertsParams& p) {
  return p.shared_intermediate_size > p.intermediate_size ? p.shared_intermediate_size : p.intermediate_size;
}

__host__ __device__ constexpr int blocks_of(int elements) {
  return (elements + kScaleBlock - 1) / kScaleBlock;
}

// One product of one expert: rows of `columns` weights with their scales.
struct Matrix {
  const uint8_t* weights;
  const float* scale;
  int rows;
  int columns;
};

// expert == num_experts means the shared one.
template <typename Format>
__device__ __forceinline__ Matrix matrix_of(const ExpertsParams& p, int expert, bool down) {
  const bool shared = expert == p.num_experts;
  const int width = shared ? p.shared_intermediate_size : p.intermediate_size;
  Matrix m;
  m.rows = down ? p.hidden_size : 2 * width;
  m.columns = down ? width : p.hidden_size;
  const void* weights =
      shared ? (down ? p.shared_down : p.shared_gate_up) : (down ? p.down_proj : p.gate_up_proj);
  const int64_t index = shared ? 0 : expert;
  m.weights = static_cast<const uint8_t*>(weights) + index * m.rows * m.columns * Format::kElementBytes;
  const float* scale = shared ? (down ? p.shared_down_scale : p.shared_gate_up_scale)
                              : (down ? p.down_scale : p.gate_up_scale);
  int64_t per_expert = 1;
  if (p.scale_kind == ScaleKind::kChannel) per_expert = m.rows;
  if (p.scale_kind == ScaleKind::kBlock128) {
    const int row_blocks = down ? blocks_of(m.rows) : 2 * blocks_of(width);  // of gate, then of up
    per_expert = (int64_t)row_blocks * blocks_of(m.columns);
  }
  m.scale = scale == nullptr ? nullptr : scale + index * per_expert;
  return m;
}

// Factor of a row for kChannel and kTensor, 1 otherwise.
__device__ __forceinline__ float row_scale(const ExpertsParams& p, const Matrix& m, int row) {
  if (p.scale_kind == ScaleKind::kChannel) return __ldg(m.scale + row);
  return p.scale_kind == ScaleKind::kTensor ? __ldg(m.scale) : 1.0f;
}

// Block scales of a lane's two rows, [blocks of k] each: of gate and up, or of one block of down.
struct BlockScales {
  const float* low;
  const float* high;
};

__device__ __forceinline__ BlockScales block_scales(const Matrix& m, int base, bool down) {
  const int row_block = (down ? base : base / 2) / kScaleBlock;
  const float* low = m.scale + row_block * blocks_of(m.columns);
  return {low, down ? low : low + blocks_of(m.rows / 2) * blocks_of(m.columns)};
}

// Sums of a 16 x 8 tile while k runs on: with block scales, each 128 elements are scaled on their own.
template <typename Format, bool kBlock, int kTiles>
struct Sums {
  using Accumulator = typename Format::Accumulator;
  Accumulator acc[kTiles][4];
  float scaled[kBlock ? kTiles : 1][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        acc[t][i] = 0;
        if constexpr (kBlock) scaled[t][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ float value(int tile, int i) const {
    return kBlock ? scaled[kBlock ? tile : 0][i] : static_cast<float>(acc[tile][i]);
  }

  // Multiplies what one step loaded. tokens: shared memory of this lane's token in tile 0;
  // token_scale(t, column, block): of the lane's two tokens of tile t.
  template <typename Loads, typename TokenScale>
  __device__ __forceinline__ void step(const Loads& loads, int segment, int segments, const uint8_t* tokens,
                                       int tile_pitch, int used_tiles, const BlockScales& weight_scale,
                                       TokenScale token_scale) {
    constexpr int kTokenBytes = kTokenSegmentBytes<Format>;
    constexpr int kBlockSegments = kScaleBlock / kSegmentElements<Format>;
    const uint8_t* mine = tokens + segment * kTokenBytes + threadIdx.x % 4 * (kTokenBytes / 4);
#pragma unroll
    for (int u = 0; u < kStepSegments; ++u) {
      if (segment + u < segments) {
        if (kTiles == 1 || used_tiles == kTiles) {
          multiply_segment<Format, kTiles>(acc, loads.low(u), loads.high(u), mine + u * kTokenBytes,
                                           tile_pitch);
        } else {
          Accumulator(&one)[1][4] = *reinterpret_cast<Accumulator(*)[1][4]>(&acc[0]);
          multiply_segment<Format, 1>(one, loads.low(u), loads.high(u), mine + u * kTokenBytes, tile_pitch);
        }
      }
      if constexpr (kBlock) {
        if (u % kBlockSegments == kBlockSegments - 1) {
          const int block = (segment + u) / kBlockSegments;
          if (segment + u - (kBlockSegments - 1) < segments) close_block(block, weight_scale, token_scale);
        }
      }
    }
  }

 private:
  template <typename TokenScale>
  __device__ __forceinline__ void close_block(int block, const BlockScales& weight_scale,
                                              TokenScale token_scale) {
    const float low = __ldg(weight_scale.low + block), high = __ldg(weight_scale.high + block);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float first = token_scale(t, 0, block), second = token_scale(t, 1, block);
      scaled[kBlock ? t : 0][0] += low * first * static_cast<float>(acc[t][0]);
      scaled[kBlock ? t : 0][1] += low * second * static_cast<float>(acc[t][1]);
      scaled[kBlock ? t : 0][2] += high * first * static_cast<float>(acc[t][2]);
      scaled[kBlock ? t : 0][3] += high * second * static_cast<float>(acc[t][3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[t][i] = 0;
    }
  }
};

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async4(void* shared, const void* global) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}
// Weights: zeros if not valid; the rest of 256 bytes will be wanted soon.
__device__ __forceinline__ void copy_weights16(void* shared, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// A step of a warp in shared memory, 4 KB. A lane reads only what it copied itself, so that no barrier is
// needed, and more bytes can be under way than registers could hold.
constexpr int kStepBytes = 2 * kStepSegments * 32 * kLaneBytes;

__device__ __forceinline__ void copy_step(uint8_t* warp_step, const uint8_t* low_row, const uint8_t* high_row,
                                          int segment, int end_bytes) {
  const int lane = threadIdx.x % 32, first = segment * kSegmentBytes + lane % 4 * kLaneBytes;
  uint8_t* mine = warp_step + lane * kLaneBytes;
#pragma unroll
  for (int u = 0; u < kStepSegments; ++u) {
    const int offset = first + u * kSegmentBytes;
    const bool inside = offset < end_bytes;
    copy_weights16(mine + 2 * u * 32 * kLaneBytes, low_row + (inside ? offset : 0), inside);
    copy_weights16(mine + (2 * u + 1) * 32 * kLaneBytes, high_row + (inside ? offset : 0), inside);
  }
}

struct StepCopies {
  const uint8_t* mine;

  __device__ __forceinline__ explicit StepCopies(const uint8_t* warp_step)
      : mine(warp_step + threadIdx.x % 32 * kLaneBytes) {}
  __device__ __forceinline__ uint4 low(int u) const {
    return *reinterpret_cast<const uint4*>(mine + 2 * u * 32 * kLaneBytes);
  }
  __device__ __forceinline__ uint4 high(int u) const {
    return *reinterpret_cast<const uint4*>(mine + (2 * u + 1) * 32 * kLaneBytes);
  }
};

// A row of tokens in memory as shared memory wants it, padded with zeros to whole segments.
template <typename Format>
__host__ __device__ constexpr int row_bytes_of(int elements) {
  return segments_of(elements, Format::kElementBytes) * kTokenSegmentBytes<Format>;
}

// Where the prepared input of the first product lies: the workspace, or what the caller gave if that will do.
struct Prepared {
  const uint8_t* codes;
  const float* scales;
  int scale_stride;  // 0: one for all tokens
};

template <typename Format>
__device__ __forceinline__ Prepared prepared_of(const ExpertsParams& p, const ExpertsPlan& plan, int scales) {
  if (plan.codes != nullptr) return {plan.codes, plan.code_scales, scales};
  if (!is_8bit(Format::kType)) return {static_cast<const uint8_t*>(p.hidden), nullptr, 0};
  const auto* codes = static_cast<const uint8_t*>(p.quantized_hidden);
  return p.gate_up_input_scale != nullptr ? Prepared{codes, p.gate_up_input_scale, 0}
                                          : Prepared{codes, p.hidden_scale, scales};
}

// One warp copies a token and its scales into shared memory, without waiting.
template <typename Format>
__device__ __forceinline__ void copy_token(uint8_t* target, float* target_scale, const uint8_t* row,
                                           int bytes, const float* scale, int scales, bool one_scale) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int offset = lane * 16; offset < bytes; offset += 512) copy_async16(target + offset, row + offset);
  if constexpr (is_8bit(Format::kType)) {
    for (int i = lane; i < scales; i += 32) copy_async4(target_scale + i, scale + (one_scale ? 0 : i));
  }
}

// Dynamic scale of values whose largest magnitude is known.
template <typename Format>
__device__ __forceinline__ float dynamic_scale(float absmax) {
  return absmax < kLeastAbsmax ? FLT_EPSILON : absmax / number_range(Format::kType);
}

// Largest value of 16 neighbouring lanes: with 8 elements per lane, of one scale block.
__device__ __forceinline__ float half_warp_max(float value) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2)
    value = max_or_nan(value, __shfl_xor_sync(kFullWarp, value, offset));
  return value;
}

__device__ __forceinline__ float absmax8(const float (&x)[8]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = max_or_nan(largest, fabsf(x[i]));
  return largest;
}

// x / scale rounded to nearest as a division would, for codes: one correction of the product with the
// reciprocal (Markstein). Far outside of the codes it need not be exact, and may not be: the correction could
// be NaN.
__device__ __forceinline__ float divide_by(float x, float scale, float reciprocal) {
  const float close = x * reciprocal;
  return fabsf(close) < 1024.0f ? fmaf(fmaf(-close, scale, x), reciprocal, close) : close;
}

// Eight neighbouring values as the tokens' format, divided by their scale.
template <typename Format>
__device__ __forceinline__ void store_encoded(typename Format::Activation* target, const float (&x)[8],
                                              float scale) {
  using Pair = decltype(Format::encode(0.0f, 0.0f));
  Vec<Pair, 4> out;
  const float reciprocal = is_8bit(Format::kType) ? 1.0f / scale : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (is_8bit(Format::kType)) {
      out.data[i] =
          Format::encode(divide_by(x[2 * i], scale, reciprocal), divide_by(x[2 * i + 1], scale, reciprocal));
    } else {
      out.data[i] = Format::encode(x[2 * i], x[2 * i + 1]);
    }
  }
  out.store(reinterpret_cast<Pair*>(target));
}

__device__ __forceinline__ void load8(const float* source, float (&x)[8]) {
  const float4 a = reinterpret_cast<const float4*>(source)[0], b = reinterpret_cast<const float4*>(source)[1];
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// Eight elements of the hidden state: fp32 if the norm is done here, else p.dtype.
__device__ __forceinline__ void load_hidden8(const ExpertsParams& p, int64_t element, float (&x)[8]) {
  if (p.norm_weight != nullptr) return load8(static_cast<const float*>(p.hidden) + element, x);
  const uint4 words = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.hidden) + element);
  const uint32_t w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair;
    if (p.dtype == DType::kBFloat16) {
      pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&w[i]));
    } else {
      pair = __half22float2(*reinterpret_cast<const __half2*>(&w[i]));
    }
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// Codes that were quantized before, as shared memory wants them.
template <typename Format>
__device__ __forceinline__ void copy_codes(typename Format::Activation* target, const uint8_t* codes) {
  const uint4 words = *reinterpret_cast<const uint4*>(codes);
  if constexpr (Format::kType == DType::kFp8E4M3) {
    const uint32_t w[4] = {words.x, words.y, words.z, words.w};
    uint32_t halves[8];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      halves[2 * i] = half2_of_e4m3x2(w[i]), halves[2 * i + 1] = half2_of_e4m3x2(w[i] >> 16);
    reinterpret_cast<uint4*>(target)[0] = {halves[0], halves[1], halves[2], halves[3]};
    reinterpret_cast<uint4*>(target)[1] = {halves[4], halves[5], halves[6], halves[7]};
  } else {
    *reinterpret_cast<uint4*>(target) = words;
  }
}

// One warp quantizes (or rounds) elements [begin, end) of one row of SwiGLU outputs; both are whole steps or
// the end of the row. target and scale ([1], or one per block of 128) are those of the row; written by the
// warp.
template <typename Format, bool kBlock>
__device__ __forceinline__ void stage_intermediate(const float* source, int columns, int begin, int end,
                                                   const float* static_scale,
                                                   typename Format::Activation* target, float* scale) {
  constexpr int kKept = 2;  // parts of 256 elements that are read once
  const int lane = threadIdx.x % 32;
  const int padded = min(end, segments_of(columns, Format::kElementBytes) * kSegmentElements<Format>);
  float kept[kKept][8] = {};
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int k = i * 256 + lane * 8;
    if (k < columns) load8(source + k, kept[i]);
  }
  float row_scale = 1.0f;
  if constexpr (is_8bit(Format::kType) && !kBlock) {
    if (static_scale != nullptr) {
      row_scale = *static_scale;
    } else {
      float largest = max_or_nan(absmax8(kept[0]), absmax8(kept[1]));
      for (int k = kKept * 256 + lane * 8; k < columns; k += 256) {
        float x[8];
        load8(source + k, x);
        largest = max_or_nan(largest, absmax8(x));
      }
      row_scale = dynamic_scale<Format>(warp_max(largest));
    }
    if (lane == 0) scale[0] = row_scale;
  }
  auto finish = [&](int k, const float (&x)[8]) {
    if constexpr (kBlock) {
      const float largest = half_warp_max(absmax8(x));
      row_scale = static_scale != nullptr ? *static_scale : dynamic_scale<Format>(largest);
      if (lane % 16 == 0 && k >= begin && k < min(end, columns)) scale[k / kScaleBlock] = row_scale;
    }
    if (k >= begin && k < padded) store_encoded<Format>(target + k, x, row_scale);
  };
#pragma unroll
  for (int i = 0; i < kKept; ++i) finish(i * 256 + lane * 8, kept[i]);
  for (int first = max(begin, kKept * 256); first < padded; first += 256) {
    const int k = first + lane * 8;
    float x[8] = {};
    if (k < columns) load8(source + k, x);
    finish(k, x);
  }
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// What an element of the result is added to.
__device__ __forceinline__ float output_before(const ExpertsParams& p, int64_t index) {
  if (!p.accumulate) return 0.0f;
  if (p.output_dtype == DType::kFloat32) return static_cast<const float*>(p.output)[index];
  if (p.output_dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(p.output)[index]);
  return to_float(static_cast<const __half*>(p.output)[index]);
}

__device__ __forceinline__ void put_output(const ExpertsParams& p, int64_t index, float value) {
  if (p.output_dtype == DType::kFloat32) {
    static_cast<float*>(p.output)[index] = value;
  } else if (p.output_dtype == DType::kBFloat16) {
    static_cast<__nv_bfloat16*>(p.output)[index] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(p.output)[index] = __float2half_rn(value);
  }
}

}  // namespace ringkernels::moe
