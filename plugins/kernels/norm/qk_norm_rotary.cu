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
__device__ __forceinline__ char* cache_place(const QkNormRotaryParams& p, void* cache, int token, int head,
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

// Heads of a token: queries, keys, values (if cached). 8 or 16 neighbouring lanes hold a head, an octet each,
// and work on kHeadBatch heads of one token, so that the loads of all are under way at once and rotation and
// norms are read once.
constexpr int kHeadBatch = 4;

__host__ __device__ __forceinline__ int heads_of(const QkNormRotaryParams& p) {
  return p.num_heads + p.num_kv_heads + (p.value_cache != nullptr ? p.num_kv_heads : 0);
}

// Cosines and sines of a lane's octet; lanes that are not rotated get 1 and 0.
struct Rotation {
  float cosine[kOctet], sine[kOctet];
  int partner;  // lane that holds the other half of each pair

  // Column j of the first half of the rotated part is paired with column j of the second half.
  template <int kHeadLanes>
  __device__ __forceinline__ static Rotation of(const QkNormRotaryParams& p, int octet, int position) {
    Rotation found;
    const int half_octets = p.rotary_dim / 2 / kOctet, lane = threadIdx.x % 32;
    const bool rotated = octet < 2 * half_octets, second = octet >= half_octets;
    const int low = second ? octet - half_octets : octet;
    found.partner = rotated ? (lane & ~(kHeadLanes - 1)) + (second ? low : octet + half_octets) : lane;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) found.cosine[i] = 1.0f, found.sine[i] = 0.0f;
    if (!rotated || position < 0) return found;
    const int64_t row = (int64_t)position * (p.rotary_dim / 2) + low * kOctet;
    load_octet(p.rotary_cos, row, DType::kFloat32, found.cosine);
    load_octet(p.rotary_sin, row, DType::kFloat32, found.sine);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) found.sine[i] = second ? found.sine[i] : -found.sine[i];
    return found;
  }
};

// SiLU, norm and rotation of one head; all lanes of a warp call this together.
template <int kHeadLanes>
__device__ __forceinline__ void norm_and_rotate(const QkNormRotaryParams& p, const Rotation& rotation,
                                                const float* norm, int column, float (&x)[kOctet]) {
  float weight[kOctet], squares = 0.0f;
  load_octet(norm, column, DType::kFloat32, weight);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    if (p.silu) x[i] *= sigmoid(x[i]);
    squares = fmaf(x[i], x[i], squares);
  }
#pragma unroll
  for (int offset = kHeadLanes / 2; offset > 0; offset /= 2)
    squares += __shfl_xor_sync(0xffffffffu, squares, offset);
  const float factor = rsqrtf(squares / (kHeadLanes * kOctet) + p.norm_eps);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) x[i] *= factor * weight[i];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) {
    const float other = __shfl_sync(0xffffffffu, x[i], rotation.partner);
    x[i] = x[i] * rotation.cosine[i] + other * rotation.sine[i];
  }
}

template <int kHeadLanes>
__global__ void __launch_bounds__(kThreads, 4)
    qk_norm_rotary_kernel(const __grid_constant__ QkNormRotaryParams p) {
  const int heads = heads_of(p), batches = (heads + kHeadBatch - 1) / kHeadBatch;
  const unsigned item = blockIdx.x * (kThreads / kHeadLanes) + threadIdx.x / kHeadLanes;
  const int token = item / (unsigned)batches, first = item % (unsigned)batches * kHeadBatch;
  const int octet = threadIdx.x % kHeadLanes, column = octet * kOctet;
  allow_next_kernel();
  wait_for_previous_kernel();

  const int position = token < p.tokens ? p.position[token] : -1;
  const int count = position >= 0 ? min(heads - first, kHeadBatch) : 0;
  const int values = p.num_heads + p.num_kv_heads;  // the first of them
  const auto local = [&](int head) {
    return head < p.num_heads ? head : head - (head < values ? p.num_heads : values);
  };
  const auto base = [&](int head) {
    return head < p.num_heads ? p.query : head < values ? p.key : const_cast<void*>(p.value);
  };
  const int64_t row = token * p.row_stride + column;
  RawOctet raw[kHeadBatch];
#pragma unroll
  for (int i = 0; i < kHeadBatch; ++i) {
    raw[i].low = raw[i].high = make_uint4(0, 0, 0, 0);
    if (i < count) raw[i].low = load_raw(base(first + i), row + local(first + i) * p.head_dim, p.dtype).low;
  }
  const Rotation rotation = Rotation::of<kHeadLanes>(p, octet, position);

#pragma unroll
  for (int i = 0; i < kHeadBatch; ++i) {
    const int head = first + i;
    const bool is_query = head < p.num_heads, is_value = head >= values;
    float x[kOctet];
    unpack(raw[i], p.dtype, x);
    norm_and_rotate<kHeadLanes>(p, rotation, is_query ? p.query_norm : p.key_norm, column, x);
    if (i >= count) continue;
    if (!is_value) store_octet(base(head), row + local(head) * p.head_dim, p.dtype, x);
    if (is_query) continue;
    if (is_value) unpack(raw[i], p.dtype, x);
    void* cache = is_value ? p.value_cache : p.key_cache;
    char* to = cache_place(p, cache, token, local(head), position, column);
    if (to != nullptr) store_cached(p, to, is_value ? p.value_scale : p.key_scale, x);
  }
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
  const int64_t batches = (int64_t)params.tokens * ((heads_of(params) + kHeadBatch - 1) / kHeadBatch);
  const int per_block = kThreads / (params.head_dim / kOctet);
  LaunchShape shape;
  shape.grid = dim3((unsigned)((batches + per_block - 1) / per_block));
  shape.block = dim3(kThreads);
  shape.stream = stream;
  shape.programmatic = params.programmatic_launch != 0;
  return launch_kernel(params.head_dim == 128 ? qk_norm_rotary_kernel<16> : qk_norm_rotary_kernel<8>, shape,
                       params);
}

}  // namespace ringkernels
