// validate, workspace_bytes and launch of RouterParams.
#include "moe/router.cuh"

#include <algorithm>

#include "common/check.h"

namespace ringkernels {

namespace {

using namespace moe;

constexpr int kTargetBlocks = 264;  // of the product: about two per SM of a large GPU

size_t words_bytes(int num_experts) {
  return (size_t)kRouterFewTokens * num_experts * sizeof(unsigned long long);
}

RouterParts plan_parts(const RouterParams& p) {
  // In 64 bits: a workspace may be asked for before the sizes are checked.
  const int64_t tiles = ((int64_t)p.tokens + kTileTokens - 1) / kTileTokens *
                        (((int64_t)p.num_experts + kTileExperts - 1) / kTileExperts);
  const int steps = (p.hidden_size - 1) / kTileK + 1;
  const int wanted = kTargetBlocks / tiles < 1 ? 1 : (int)(kTargetBlocks / tiles);
  // At least two steps per block: the first one fills the pipeline.
  int steps_per_split = (steps + wanted - 1) / wanted;
  if (steps_per_split < 2) steps_per_split = 2;
  RouterParts parts = {};
  parts.k_per_split = steps_per_split * kTileK;
  parts.splits = (steps + steps_per_split - 1) / steps_per_split;
  // After the words of the one-kernel router, which must stay zero.
  parts.logits = reinterpret_cast<float*>(static_cast<uint8_t*>(p.workspace) + words_bytes(p.num_experts));
  parts.squares = parts.logits + (int64_t)parts.splits * p.tokens * p.num_experts;
  return parts;
}

template <typename Hidden, int kTokens, int kRowsPerBlock>
Status launch_few(const RouterParams& p, LaunchShape shape) {
  shape.grid = dim3((p.num_experts + kRowsPerBlock - 1) / kRowsPerBlock + p.tokens);
  return ranks_serve(p) ? launch_kernel(router_few_kernel<Hidden, kTokens, kRowsPerBlock, true>, shape, p)
                        : launch_kernel(router_few_kernel<Hidden, kTokens, kRowsPerBlock, false>, shape, p);
}

template <typename Hidden>
Status launch_router(const RouterParams& p, Stream stream) {
  LaunchShape shape;
  shape.block = dim3(kRouterThreads);
  shape.stream = stream;
  shape.programmatic = p.programmatic_launch != 0;
  if (p.tokens == 1) return launch_few<Hidden, 1, 4>(p, shape);
  if (p.tokens <= kRouterFewTokens) return launch_few<Hidden, kRouterFewTokens, 4>(p, shape);
  const RouterParts parts = plan_parts(p);
  shape.grid = dim3((p.tokens + kTileTokens - 1) / kTileTokens, parts.splits,
                    (p.num_experts + kTileExperts - 1) / kTileExperts);
  shape.shared_bytes = kTileBytes;
  RING_RETURN_IF_ERROR(launch_kernel(router_product_kernel<Hidden>, shape, p, parts));
  shape.grid = dim3(p.tokens);
  shape.shared_bytes = 0;
  return ranks_serve(p) ? launch_kernel(router_choice_kernel<true>, shape, p, parts)
                        : launch_kernel(router_choice_kernel<false>, shape, p, parts);
}

}  // namespace

size_t workspace_bytes(const RouterParams& p) {
  if (p.tokens <= 0 || p.num_experts <= 0 || p.hidden_size <= 0) return 0;
  if (p.tokens <= kRouterFewTokens) return words_bytes(p.num_experts);
  return words_bytes(p.num_experts) +
         (size_t)plan_parts(p).splits * p.tokens * (p.num_experts + 1) * sizeof(float);
}

size_t max_workspace_bytes(const RouterParams& p) {
  size_t largest = workspace_bytes(p);
  RouterParams fewer = p;
  // The parts change with the tiles only, up to where there is one part.
  for (int tiles = 1; tiles <= kTargetBlocks && tiles * kTileTokens < p.tokens; ++tiles) {
    fewer.tokens = tiles * kTileTokens;
    largest = std::max(largest, workspace_bytes(fewer));
  }
  return largest;
}

Status validate(const RouterParams& p) {
  RING_REQUIRE(p.tokens >= 0, kBadShape, "tokens", "0 or more", p.tokens);
  RING_REQUIRE(p.hidden_size > 0 && p.hidden_size % 8 == 0, kBadShape, "hidden_size", "a multiple of 8",
               p.hidden_size);
  RING_REQUIRE(p.num_experts > 0 && p.num_experts <= kMaxExperts, kBadShape, "num_experts", "1 to 1024",
               p.num_experts);
  RING_REQUIRE(p.n_group > 0 && p.n_group <= kMaxGroups && p.num_experts % p.n_group == 0, kBadShape,
               "n_group", "1 to 32, a divisor of num_experts", p.n_group);
  RING_REQUIRE(p.topk_group > 0 && p.topk_group <= p.n_group, kBadShape, "topk_group", "1 to n_group",
               p.topk_group);
  const int candidates = p.num_experts / p.n_group * p.topk_group;
  RING_REQUIRE(p.top_k > 0 && p.top_k <= kMaxTopK && p.top_k <= candidates, kBadShape, "top_k",
               "1 to 32, at most the experts of topk_group groups", p.top_k);
  RING_REQUIRE(p.hidden_dtype == DType::kBFloat16 || p.hidden_dtype == DType::kFloat16 ||
                   p.hidden_dtype == DType::kFloat32,
               kBadType, "hidden_dtype", "bf16, fp16 or fp32", p.hidden_dtype);
  RING_REQUIRE(p.norm_weight == nullptr || p.hidden_dtype == DType::kFloat32, kBadType, "hidden_dtype",
               "fp32 where the norm is done here", p.hidden_dtype);
  if (p.tokens == 0) return Status{};
  RING_REQUIRE_POINTER(p, hidden);
  RING_REQUIRE_ALIGNED(p, hidden);
  RING_REQUIRE_ALIGNED(p, norm_weight);
  RING_REQUIRE_POINTER(p, router_weight);
  RING_REQUIRE_ALIGNED(p, router_weight);
  RING_REQUIRE_POINTER(p, expert_bias);
  RING_REQUIRE_POINTER(p, expert_ids);
  RING_REQUIRE_POINTER(p, routing_weights);
  RING_REQUIRE_POINTER(p, workspace);
  RING_REQUIRE_ALIGNED(p, workspace);
  RING_REQUIRE(p.workspace_bytes >= (int64_t)workspace_bytes(p), kWorkspace, "workspace_bytes",
               "at least workspace_bytes()", p.workspace_bytes);
  return Status{};
}

Status launch(const RouterParams& p, Stream stream) {
  RING_RETURN_IF_ERROR(validate(p));
  if (p.tokens == 0) return Status{};
  switch (p.hidden_dtype) {
    case DType::kFloat32: return launch_router<float>(p, stream);
    case DType::kBFloat16: return launch_router<__nv_bfloat16>(p, stream);
    default: return launch_router<__half>(p, stream);
  }
}

}  // namespace ringkernels
