// RMS norm and rotary embedding of every query and key head, in place, and the cache write of keys and
// values.
#include "common/check.h"
#include "common/launch.cuh"
#include "norm/row_math.cuh"
#include "ringkernels/norm.h"

namespace ringkernels {
namespace {

constexpr int kThreads = 256;

bool is_half(DType dtype) { return dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

// Where a head of a token goes in a cache; null if it is not cached.
template <typename T>
__device__ __forceinline__ char* cache_place(const QkNormRotaryParams& p, T* cache, int token, int head,
                                             int position, int column) {
  if (cache == nullptr) return nullptr;
  const int slot = p.slots[token];
  if (slot < 0 || position >= p.capacity) return nullptr;
  const int64_t row = ((int64_t)slot * p.num_kv_heads + head) * p.capacity + position;
  return static_cast<char*>(cache) + (row * p.head_dim + column) * (int64_t)size_of(p.cache_dtype);
}

__device__ __forceinline__ void store_cached(const QkNormRotaryParams& p, char* place, const float* scale,
                                             const float (&x)[kOctet]) {
  if (p.cache_dtype == DType::kFp8E4M3)
    *reinterpret_cast<uint2*>(place) = quantize_octet(x, *scale, DType::kFp8E4M3);
  else
    *reinterpret_cast<uint4*>(place) = pack_half(x, p.cache_dtype);
}

// One lane per octet: 8 or 16 neighbouring lanes hold a head. Heads of a token: queries, keys, values (if
// cached).
template <int kHeadLanes>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rotary_kernel(const __grid_constant__ QkNormRotaryParams p) {
  const int cached_values = p.value_cache != nullptr ? p.num_kv_heads : 0;
  const int heads = p.num_heads + p.num_kv_heads + cached_values;
  const int64_t item = (int64_t)blockIdx.x * (kThreads / kHeadLanes) + threadIdx.x / kHeadLanes;
  const int token = (int)(item / heads), head = (int)(item % heads);
  const int octet = threadIdx.x % kHeadLanes, column = octet * kOctet;
  const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;
  allow_next_kernel();

  float norm[kOctet] = {};
  if (!is_value) load_octet(is_query ? p.query_norm : p.key_norm, column, DType::kFloat32, norm);
  wait_for_previous_kernel();

  const int position = token < p.tokens ? p.position[token] : -1;
  const bool inside = position >= 0;
  const int kv_head = is_value ? head - p.num_heads - p.num_kv_heads : head - p.num_heads;
  void* base = is_query ? p.query : is_value ? const_cast<void*>(p.value) : p.key;
  const int64_t index = token * p.row_stride + (is_query ? head : kv_head) * p.head_dim + column;
  float x[kOctet] = {};
  if (inside) load_octet(base, index, p.dtype, x);
  if (is_value) {
    char* place = inside ? cache_place(p, p.value_cache, token, kv_head, position, column) : nullptr;
    if (place != nullptr) store_cached(p, place, p.value_scale, x);
  }

  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (p.silu) x[i] *= sigmoid(x[i]);
    squares = fmaf(x[i], x[i], squares);
  }
#pragma unroll
  for (int offset = kHeadLanes / 2; offset > 0; offset /= 2)
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  const float factor = 1.0f / sqrtf(squares / (kHeadLanes * kOctet) + p.norm_eps);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] *= factor * norm[i];

  // Column j of the first half of the rotated part is paired with column j of the second half.
  const int half_octets = p.rotary_dim / 2 / kOctet;
  const bool rotated = octet < 2 * half_octets, second = octet >= half_octets;
  const int partner =
      (threadIdx.x % 32 & ~(kHeadLanes - 1)) + (second ? octet - half_octets : octet + half_octets);
  float cosine[kOctet] = {}, sine[kOctet] = {};
  if (inside && rotated && !is_value) {
    const int64_t row =
        (int64_t)position * (p.rotary_dim / 2) + (second ? octet - half_octets : octet) * kOctet;
    load_octet(p.rotary_cos, row, DType::kFloat32, cosine);
    load_octet(p.rotary_sin, row, DType::kFloat32, sine);
  }
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float other = __shfl_sync(0xffffffffu, x[i], rotated ? partner : threadIdx.x % 32);
    if (rotated) x[i] = x[i] * cosine[i] + (second ? other : -other) * sine[i];
  }
  if (!inside || is_value) return;
  store_octet(base, index, p.dtype, x);
  if (is_query) return;
  char* place = cache_place(p, p.key_cache, token, kv_head, position, column);
  if (place != nullptr) store_cached(p, place, p.key_scale, x);
}

Status validate_cache(const QkNormRotaryParams& params) {
  RING_REQUIRE_POINTER(params, key_cache);
  RING_REQUIRE_ALIGNED(params, key_cache);
  RING_REQUIRE_POINTER(params, value_cache);
  RING_REQUIRE_ALIGNED(params, value_cache);
  RING_REQUIRE_POINTER(params, value);
  RING_REQUIRE_ALIGNED(params, value);
  RING_REQUIRE_POINTER(params, slots);
  RING_REQUIRE(params.capacity >= 1, kBadShape, "capacity", "at least 1", params.capacity);
  if (params.cache_dtype == DType::kFp8E4M3) {
    RING_REQUIRE_POINTER(params, key_scale);
    RING_REQUIRE_POINTER(params, value_scale);
    return Status{};
  }
  RING_REQUIRE(is_half(params.cache_dtype), kBadType, "cache_dtype", "bfloat16, float16 or fp8_e4m3",
               params.cache_dtype);
  return Status{};
}

}  // namespace

Status validate(const QkNormRotaryParams& params) {
  RING_REQUIRE(params.tokens >= 0, kBadShape, "tokens", "0 or more", params.tokens);
  RING_REQUIRE(params.head_dim == 64 || params.head_dim == 128, kBadShape, "head_dim", "64 or 128",
               params.head_dim);
  RING_REQUIRE(params.num_heads >= 1, kBadShape, "num_heads", "at least 1", params.num_heads);
  RING_REQUIRE(params.num_kv_heads >= 1, kBadShape, "num_kv_heads", "at least 1", params.num_kv_heads);
  RING_REQUIRE(params.rotary_dim >= 0 && params.rotary_dim <= params.head_dim && params.rotary_dim % 16 == 0,
               kBadShape, "rotary_dim", "a multiple of 16 up to head_dim", params.rotary_dim);
  RING_REQUIRE(params.row_stride % kOctet == 0, kMisaligned, "row_stride", "a multiple of 8",
               params.row_stride);
  RING_REQUIRE(is_half(params.dtype), kBadType, "dtype", "bfloat16 or float16", params.dtype);
  RING_REQUIRE(params.norm_eps >= 0.0f, kBadShape, "norm_eps", "0 or more", params.norm_eps);
  RING_REQUIRE_POINTER(params, query);
  RING_REQUIRE_ALIGNED(params, query);
  RING_REQUIRE_POINTER(params, key);
  RING_REQUIRE_ALIGNED(params, key);
  RING_REQUIRE_POINTER(params, query_norm);
  RING_REQUIRE_ALIGNED(params, query_norm);
  RING_REQUIRE_POINTER(params, key_norm);
  RING_REQUIRE_ALIGNED(params, key_norm);
  RING_REQUIRE_POINTER(params, position);
  if (params.rotary_dim > 0) {
    RING_REQUIRE_POINTER(params, rotary_cos);
    RING_REQUIRE_ALIGNED(params, rotary_cos);
    RING_REQUIRE_POINTER(params, rotary_sin);
    RING_REQUIRE_ALIGNED(params, rotary_sin);
  }
  return params.key_cache != nullptr || params.value_cache != nullptr ? validate_cache(params) : Status{};
}

size_t workspace_bytes(const QkNormRotaryParams&) { return 0; }

Status launch(const QkNormRotaryParams& params, Stream stream) {
  RING_RETURN_IF_ERROR(validate(params));
  if (params.tokens == 0) return Status{};
  const int cached_values = params.value_cache != nullptr ? params.num_kv_heads : 0;
  const int64_t heads = (int64_t)params.tokens * (params.num_heads + params.num_kv_heads + cached_values);
  const int per_block = kThreads / (params.head_dim / kOctet);
  LaunchShape shape;
  shape.grid = dim3((unsigned)((heads + per_block - 1) / per_block));
  shape.block = dim3(kThreads);
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  return launch_kernel(params.head_dim == 128 ? qk_norm_rotary_kernel<16> : qk_norm_rotary_kernel<8>, shape,
                       params);
}

}  // namespace ringkernels
