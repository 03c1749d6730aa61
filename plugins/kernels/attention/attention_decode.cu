// Checks, workspace and dispatch of the decode attention.
#include "attention/decode.cuh"
#include "common/check.h"

namespace ringkernels {
namespace {

using attention::Workspace;

constexpr int kDefaultBlockSlots = 264;  // where no GPU can be asked
// The workspace is that of the largest GPU: an engine may be sized on another machine than it runs on.
constexpr int kMaxBlockSlots = attention::kBlocksPerMultiprocessor * 192;
// Counters have a place of their own: they stay zero whatever batch the next launch has. More pairs than that
// give every block of any GPU work without a split.
constexpr int kCounters = 16384;
constexpr int64_t kCounterBytes = kCounters * sizeof(int);

int64_t round_up(int64_t value) { return (value + 15) / 16 * 16; }

int block_slots() {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    cudaGetLastError();
    return kDefaultBlockSlots;
  }
  return std::min(attention::kBlocksPerMultiprocessor * multiprocessors, kMaxBlockSlots);
}

// Of rows and kv heads. In 64 bits: a workspace may be asked for before the sizes are checked.
int64_t pairs_of(const AttentionDecodeParams& p) { return static_cast<int64_t>(p.batch) * p.num_kv_heads; }

// The largest number of parts over all choices of the split.
int64_t max_parts(int64_t pairs) {
  if (pairs > kCounters) return pairs;
  return pairs * attention::max_splits(static_cast<int>(pairs), kMaxBlockSlots);
}

int choose(const AttentionDecodeParams& p) {
  const int64_t pairs = pairs_of(p);
  if (pairs > kCounters) return 1;
  const int tokens = 4096 / (p.head_dim * static_cast<int>(size_of(p.cache_dtype)));
  return attention::choose_splits((p.max_context + tokens - 1) / tokens, static_cast<int>(pairs),
                                  block_slots());
}

Workspace carve(const AttentionDecodeParams& p) {
  const int group = p.num_heads / p.num_kv_heads;
  char* at = static_cast<char*>(p.workspace);
  Workspace workspace;
  workspace.counters = reinterpret_cast<int*>(at);
  at += kCounterBytes;
  workspace.maxima = reinterpret_cast<float2*>(at);
  at += round_up(max_parts(pairs_of(p)) * group * sizeof(float2));
  workspace.outputs = reinterpret_cast<float*>(at);
  return workspace;
}

}  // namespace

namespace attention {
extern template Status dispatch_decode<__half, __half>(const AttentionDecodeParams&, const Workspace&, int,
                                                       Stream);
extern template Status dispatch_decode<__half, __nv_fp8_e4m3>(const AttentionDecodeParams&, const Workspace&,
                                                              int, Stream);
extern template Status dispatch_decode<__nv_bfloat16, __nv_bfloat16>(const AttentionDecodeParams&,
                                                                     const Workspace&, int, Stream);
extern template Status dispatch_decode<__nv_bfloat16, __nv_fp8_e4m3>(const AttentionDecodeParams&,
                                                                     const Workspace&, int, Stream);
}  // namespace attention

Status validate(const AttentionDecodeParams& p) {
  RING_REQUIRE(p.batch >= 0 && p.batch <= 65535, kBadShape, "batch", "0 to 65535", p.batch);
  RING_REQUIRE(p.head_dim == 64 || p.head_dim == 128, kBadShape, "head_dim", "64 or 128", p.head_dim);
  RING_REQUIRE(p.num_kv_heads > 0 && p.num_kv_heads <= 65535, kBadShape, "num_kv_heads", "1 to 65535",
               p.num_kv_heads);
  RING_REQUIRE(p.num_heads > 0 && p.num_heads % p.num_kv_heads == 0 && p.num_heads / p.num_kv_heads <= 16,
               kBadShape, "num_heads", "a multiple of num_kv_heads, at most 16 times as many", p.num_heads);
  RING_REQUIRE(p.rotary_dim >= 0 && p.rotary_dim <= p.head_dim && p.rotary_dim % 2 == 0, kBadShape,
               "rotary_dim", "an even number, at most head_dim", p.rotary_dim);
  RING_REQUIRE(p.max_context > 0 && p.max_context <= p.capacity, kBadShape, "max_context", "1 to capacity",
               p.max_context);
  RING_REQUIRE(p.capacity <= INT32_MAX, kBadShape, "capacity", "at most 2^31 - 1", p.capacity);
  RING_REQUIRE(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kBadType, "dtype",
               "kBFloat16 or kFloat16", p.dtype);
  RING_REQUIRE(p.cache_dtype == p.dtype || p.cache_dtype == DType::kFp8E4M3, kBadType, "cache_dtype",
               "dtype or kFp8E4M3", p.cache_dtype);
  RING_REQUIRE(p.row_stride >= static_cast<int64_t>(p.num_heads) * p.head_dim || p.batch <= 1, kBadShape,
               "row_stride", "at least a row of query", p.row_stride);
  RING_REQUIRE(p.output_row_stride >= static_cast<int64_t>(p.num_heads) * p.head_dim || p.batch <= 1,
               kBadShape, "output_row_stride", "at least num_heads * head_dim", p.output_row_stride);
  RING_REQUIRE(p.output_row_stride % 8 == 0, kMisaligned, "output_row_stride", "a multiple of 8",
               p.output_row_stride);
  RING_REQUIRE_POINTER(p, query);
  RING_REQUIRE_POINTER(p, key);
  RING_REQUIRE_POINTER(p, value);
  RING_REQUIRE_POINTER(p, key_cache);
  RING_REQUIRE_POINTER(p, value_cache);
  RING_REQUIRE_POINTER(p, position);
  RING_REQUIRE_POINTER(p, output);
  RING_REQUIRE_ALIGNED(p, key_cache);
  RING_REQUIRE_ALIGNED(p, value_cache);
  RING_REQUIRE_ALIGNED(p, output);
  RING_REQUIRE((p.rotary_cos == nullptr) == (p.rotary_sin == nullptr), kNullPointer, "rotary_sin",
               "both rotary tables or none", p.rotary_sin != nullptr);
  if (p.cache_dtype == DType::kFp8E4M3) {
    RING_REQUIRE_POINTER(p, key_scale);
    RING_REQUIRE_POINTER(p, value_scale);
  }
  RING_REQUIRE_POINTER(p, workspace);
  RING_REQUIRE_ALIGNED(p, workspace);
  RING_REQUIRE(p.workspace_bytes >= static_cast<int64_t>(workspace_bytes(p)), kWorkspace, "workspace_bytes",
               "workspace_bytes()", p.workspace_bytes);
  return Status{};
}

size_t workspace_bytes(const AttentionDecodeParams& p) {
  if (p.num_kv_heads <= 0 || p.batch <= 0) return 16;
  const int64_t parts = max_parts(pairs_of(p)) * (p.num_heads / p.num_kv_heads);
  return kCounterBytes + round_up(parts * sizeof(float2)) +
         parts * p.head_dim * sizeof(float);
}

Status launch(const AttentionDecodeParams& p, Stream stream) {
  RING_RETURN_IF_ERROR(validate(p));
  if (p.batch == 0) return Status{};
  const Workspace workspace = carve(p);
  const int splits = choose(p);
  const bool fp8 = p.cache_dtype == DType::kFp8E4M3;
  if (p.dtype == DType::kFloat16) {
    return fp8 ? attention::dispatch_decode<__half, __nv_fp8_e4m3>(p, workspace, splits, stream)
               : attention::dispatch_decode<__half, __half>(p, workspace, splits, stream);
  }
  return fp8 ? attention::dispatch_decode<__nv_bfloat16, __nv_fp8_e4m3>(p, workspace, splits, stream)
             : attention::dispatch_decode<__nv_bfloat16, __nv_bfloat16>(p, workspace, splits, stream);
}

}  // namespace ringkernels
