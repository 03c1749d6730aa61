// One row on sm_90a: a chain of latencies more than a stream of bytes. The bulk copy engine has the weights
// under way before the kernel ahead has ended; then all threads norm and quantize the input, each block for
// itself, and two warpgroups multiply, of which the second takes every other step of k.
//
// The input is the first of wgmma's eight columns; the others hold what is left in shared memory, and nobody
// reads their sums. So do the rows of a tile of less than 64.
#pragma once

#include "projection/hopper.cuh"
#include "projection/hopper_row.h"

namespace ringkernels::hopper_projection {

constexpr int kStagers = 256;                 // two warpgroups
constexpr int kRowThreads = kStagers + 32;    // and a warp that asks for weights
constexpr int kMaxRowStages = 32;
constexpr int kMaxRowPartials = 64;
constexpr int kColumnsBytes = 8 * kSumBytes;  // wgmma's columns for a step of k
constexpr int kMaxHeld = 2;                   // octets of the input that a thread has
constexpr int kMaxRowColumns = kStagers * kOctet * kMaxHeld;

struct RowShared {
  float2 partials[kMaxRowPartials];
  uint32_t sums[2][kRows];  // of the second warpgroup, by turns
  uint64_t full[kMaxRowStages];
  uint64_t empty[kMaxRowStages];
};

// wgmma reads 64 rows of the last stage, however many it has.
__host__ __device__ inline int ring_bytes(const RowPlan& plan) {
  return ((plan.stages - 1) * plan.rows + kRows) * kSumBytes;
}

// Columns, the ring of weights, and the small things; 1024 to align them.
inline size_t row_shared_bytes(const RowPlan& plan) {
  return 1024 + (size_t)plan.steps * kColumnsBytes + ring_bytes(plan) + sizeof(RowShared);
}

template <Prologue kPrologue>
struct RowInput;  // an octet as it is loaded
template <>
struct RowInput<Prologue::kRmsNorm> {
  RawOctet weight, raw;
};
template <>
struct RowInput<Prologue::kGroupNormGate> {
  RawOctet weight;
  uint4 raw, gate;
};
template <>
struct RowInput<Prologue::kNone> {
  uint4 raw;
};

// The input row: held in registers from its loads to its place in shared memory.
template <Format kFormat, Prologue kPrologue, int kHeld>
class RowStager {
 public:
  static constexpr bool kQuantized = kFormat == Format::kFp8 || kFormat == Format::kInt8;
  static constexpr DType kDType = kFormat == Format::kFp8    ? DType::kFp8E4M3
                                  : kFormat == Format::kInt8 ? DType::kInt8
                                  : kFormat == Format::kFloat16 ? DType::kFloat16
                                                                : DType::kBFloat16;
  static constexpr DType kHalf = kFormat == Format::kFloat16 ? DType::kFloat16 : DType::kBFloat16;

  __device__ __forceinline__ RowStager(const ProjectionParams& p, const RowPlan& plan)
      : p_(p), plan_(plan), octets_(p.k / kOctet) {
    if constexpr (kPrologue != Prologue::kNone) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i)
        if (inside(i)) in_[i].weight = load_raw(p.norm_weight, octet(i) * kOctet, DType::kFloat32);
    }
    static_scale_ = kQuantized && p.static_scale != nullptr ? *p.static_scale : 0.0f;
  }

  // After the wait for the kernel ahead.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (!inside(i)) continue;
      const int k = octet(i) * kOctet;
      if constexpr (kPrologue == Prologue::kRmsNorm) {
        in_[i].raw = load_raw(p_.input, k, DType::kFloat32);
      } else {
        in_[i].raw = load_raw(p_.input, k, kHalf).low;
        if constexpr (kPrologue == Prologue::kGroupNormGate) in_[i].gate = load_raw(p_.gate, k, kHalf).low;
      }
    }
  }

  // All 256 threads. Returns the scale of the codes.
  __device__ __forceinline__ float store(RowShared& shared, uint8_t* columns) {
    float x[kHeld][kOctet];
    const bool measured = kPrologue != Prologue::kNone || (kQuantized && p_.static_scale == nullptr);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kStagers >= octets_) break;
      float2 sums = make_float2(0.0f, 0.0f);
      if (inside(i)) {
        sums.x = products(in_[i], x[i]);
        sums.y = largest_of(x[i]);
      }
      if (measured) leave_partial(shared.partials, plan_.layout, octet(i), inside(i), sums);
    }
    RowStats stats = {1.0f, 0.0f};
    if (measured) {
      asm volatile("bar.sync 1, 256;" ::: "memory");
      stats = gather_row(shared.partials, plan_.layout, kPrologue == Prologue::kNone ? -1.0f : p_.norm_eps);
    }
    const float scale = !kQuantized                  ? 1.0f
                        : p_.static_scale == nullptr ? dynamic_scale(stats.largest, kDType)
                                                     : static_scale_;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kStagers >= octets_) break;
      const float factor = stats.factor(plan_.layout, octet(i));
#pragma unroll
      for (int e = 0; e < kOctet; ++e) x[i][e] *= factor;
      constexpr int kBytes = kOctet * (kQuantized ? 1 : 2);
      const int byte = octet(i) * kBytes;
      uint8_t* place = columns + byte / kSumBytes * kColumnsBytes + byte % kSumBytes;
      if (!inside(i)) continue;
      if constexpr (kQuantized)
        *reinterpret_cast<uint2*>(place) = quantize_octet(x[i], scale, kDType);
      else
        *reinterpret_cast<uint4*>(place) = pack_half(x[i], kDType);
    }
    asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 256;" ::: "memory");  // wgmma reads it
    return scale;
  }

 private:
  __device__ __forceinline__ int octet(int i) const { return (int)threadIdx.x + i * kStagers; }
  __device__ __forceinline__ bool inside(int i) const { return octet(i) < octets_; }

  // x: what is left to be multiplied by 1 / rms. Returns the input's sum of squares.
  static __device__ __forceinline__ float products(const RowInput<kPrologue>& in, float (&x)[kOctet]) {
    if constexpr (kPrologue == Prologue::kRmsNorm)
      unpack(in.raw, DType::kFloat32, x);
    else
      unpack(RawOctet{in.raw, {}}, kHalf, x);
    float squares = 0.0f;
    if constexpr (kPrologue != Prologue::kNone) {
      float w[kOctet];
      unpack(in.weight, DType::kFloat32, w);
      if constexpr (kPrologue == Prologue::kGroupNormGate) {
        float g[kOctet];
        unpack(RawOctet{in.gate, {}}, kHalf, g);
#pragma unroll
        for (int i = 0; i < kOctet; ++i) w[i] *= sigmoid(g[i]);
      }
#pragma unroll
      for (int i = 0; i < kOctet; ++i) squares = fmaf(x[i], x[i], squares);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) x[i] *= w[i];
    }
    return squares;
  }

  const ProjectionParams& p_;
  const RowPlan& plan_;
  int octets_;
  float static_scale_;
  RowInput<kPrologue> in_[kHeld];
};

// A place in the ring of weights.
struct RowCursor {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void move(int steps, int stages) {
    stage += steps;
    while (stage >= stages) stage -= stages, phase ^= 1;
  }
};

// The one thread that asks for weights: the steps of all tiles of the block, one after the other.
__device__ __forceinline__ void ask_weights(RowShared& shared, uint8_t* ring, const CUtensorMap& map,
                                            const RowPlan& plan) {
  const uint32_t bytes = plan.rows * kSumBytes;
  RowCursor at;
  int asked = 0;
  for (int tile = blockIdx.x; tile < plan.tiles; tile += plan.blocks) {
    for (int step = 0; step < plan.steps; ++step) {
      if (asked++ >= plan.stages) barrier_wait(&shared.empty[at.stage], at.phase ^ 1);
      barrier_expect(&shared.full[at.stage], bytes);
      copy_2d(ring + at.stage * bytes, &map, &shared.full[at.stage], step * kSumBytes, tile * plan.rows);
      at.move(1, plan.stages);
    }
  }
}

// The products of a warpgroup: every other step of a tile.
template <Format kFormat>
struct RowProducts {
  using Sum = typename Accumulator<kFormat>::type;

  RowShared& shared;
  const RowPlan& plan;
  uint32_t ring, columns;
  RowCursor at;  // of the first step of the tile that is this warpgroup's

  // kGroup steps, each with sums of its own: products of one sum wait for each other, and Hopper sums FP8
  // products in about 14 bits. They are added to the total in their order.
  template <int kGroup>
  __device__ __forceinline__ void add_group(RowCursor& where, int step, Sum (&total)[4]) {
    Sum sums[kGroup][4];
    uint64_t a[kGroup];
    RowCursor used = where;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      pin(sums[i]);
      barrier_wait(&shared.full[where.stage], where.phase);
      a[i] = tile_descriptor(ring + where.stage * plan.rows * kSumBytes);
      where.move(2, plan.stages);
    }
    constexpr uint64_t kTwoSteps = 2 * kColumnsBytes >> 4;  // in a descriptor
    const uint64_t b = tile_descriptor(columns + step * kColumnsBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSumBytes / 32; ++k)
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        Wgmma<kFormat, 8>::run(sums[i], a[i] + 2 * k, b + i * kTwoSteps + 2 * k, k > 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      pin(sums[i]);
      if (threadIdx.x % 32 == 0) barrier_arrive(&shared.empty[used.stage]);
      used.move(2, plan.stages);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += sums[i][e];
    }
  }

  // The steps first, first + 2, ... of the next tile.
  __device__ __forceinline__ void tile(int first, Sum (&total)[4]) {
    RowCursor where = at;
    at.move(plan.steps, plan.stages);
#pragma unroll
    for (auto& value : total) value = 0;
    int step = first;
    // All stages of a group are there before the first is given back.
    for (; plan.stages >= 8 && step + 6 < plan.steps; step += 8) add_group<4>(where, step, total);
    for (; step < plan.steps; step += 2) add_group<1>(where, step, total);
  }
};

template <typename Sum>
__device__ __forceinline__ uint32_t bits_of(Sum sum) {
  return reinterpret_cast<const uint32_t&>(sum);
}

// What a thread of the first warpgroup finishes: two rows of a tile, if its lane has them.
struct RowResults {
  int row[2];
  bool mine[2];
  float factor[2], before[2];

  __device__ __forceinline__ RowResults(const ProjectionParams& p, const RowPlan& plan, int tile,
                                        bool scaled) {
    const int first = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int within = first + 8 * i;
      row[i] = tile * plan.rows + within;
      mine[i] = threadIdx.x < 128 && threadIdx.x % 4 == 0 && within < plan.rows && row[i] < p.n;
      factor[i] = 1.0f;
      if (scaled && mine[i])
        factor[i] = __ldg(p.weight_scale + (p.weight_scale_kind == ScaleKind::kTensor ? 0 : row[i]));
    }
  }
  // After the wait for the kernel ahead.
  __device__ __forceinline__ void load(const ProjectionParams& p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) before[i] = mine[i] ? output_before(p, 0, row[i]) : 0.0f;
  }
};

// All threads, which come from two places: __syncthreads() would ask them to come from one. Warps come whole,
// as PTX wants it, though synccheck reports it; from one place, or lane by lane, it costs 3 to 12 us a step.
__device__ __forceinline__ void meet_all() { asm volatile("bar.sync 2, 288;" ::: "memory"); }
static_assert(kRowThreads == 288);

// grid: plan.blocks. The first warpgroup adds the sums of the second to its own.
template <Format kFormat, Prologue kPrologue, int kHeld>
__global__ void __launch_bounds__(kRowThreads, 1)
    hopper_row_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ ProjectionParams p,
                      const __grid_constant__ RowPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Stager = RowStager<kFormat, kPrologue, kHeld>;
  using Sum = typename Accumulator<kFormat>::type;
  extern __shared__ uint8_t shared_memory[];
  uint8_t* columns = shared_memory + ((1024 - (shared_address(shared_memory) & 1023)) & 1023);
  uint8_t* ring = columns + plan.steps * kColumnsBytes;
  RowShared& shared = *reinterpret_cast<RowShared*>(ring + ring_bytes(plan));
  if (threadIdx.x >= kStagers) {
    for (int stage = threadIdx.x % 32; stage < plan.stages; stage += 32) {
      barrier_init(&shared.full[stage], 1);
      barrier_init(&shared.empty[stage], 4);  // warps of the group that reads it
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
    meet_all();
    if (threadIdx.x == kStagers) ask_weights(shared, ring, map, plan);
    return;
  }
  Stager stager(p, plan);
  RowResults results(p, plan, blockIdx.x, Stager::kQuantized);
  meet_all();  // the barriers are there
  wait_for_previous_kernel();
  allow_next_kernel();
  stager.load();
  results.load(p);
  const float scale = stager.store(shared, columns);
  const int group = threadIdx.x / 128;
  RowProducts<kFormat> products{
      shared, plan, shared_address(ring), shared_address(columns), {}};
  products.at.move(group, plan.stages);
  int turn = 0;
  for (int tile = blockIdx.x; tile < plan.tiles; tile += plan.blocks, turn ^= 1) {
    if (tile != (int)blockIdx.x) {
      results = RowResults(p, plan, tile, Stager::kQuantized);
      results.load(p);
    }
    Sum total[4];
    products.tile(group, total);
    const int first = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    if (group == 1 && threadIdx.x % 4 == 0) {
      shared.sums[turn][first] = bits_of(total[0]);
      shared.sums[turn][first + 8] = bits_of(total[2]);
    }
    asm volatile("bar.sync 1, 256;" ::: "memory");
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!results.mine[i]) continue;
      const uint32_t bits = shared.sums[turn][first + 8 * i];
      const Sum sum = total[2 * i] + reinterpret_cast<const Sum&>(bits);
      put_output(p, 0, results.row[i], results.before[i] + (float)sum * (scale * results.factor[i]));
    }
  }
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  __trap();  // the library must be built for 90a
#endif
}

template <Format kFormat, Prologue kPrologue>
Status launch_row_prologue(const ProjectionParams& p, const RowPlan& plan, const CUtensorMap& map,
                           const LaunchShape& shape) {
  if (p.k <= kStagers * kOctet)
    return launch_kernel(hopper_row_kernel<kFormat, kPrologue, 1>, shape, map, p, plan);
  return launch_kernel(hopper_row_kernel<kFormat, kPrologue, kMaxHeld>, shape, map, p, plan);
}

template <Format kFormat>
Status launch_row_format(const ProjectionParams& p, const RowPlan& plan, const CUtensorMap& map,
                         const LaunchShape& shape) {
  switch (p.prologue) {
    case Prologue::kRmsNorm: return launch_row_prologue<kFormat, Prologue::kRmsNorm>(p, plan, map, shape);
    case Prologue::kGroupNormGate:
      return launch_row_prologue<kFormat, Prologue::kGroupNormGate>(p, plan, map, shape);
    default: return launch_row_prologue<kFormat, Prologue::kNone>(p, plan, map, shape);
  }
}

using RowLauncher = Status(const ProjectionParams&, const RowPlan&, const CUtensorMap&, const LaunchShape&);
RowLauncher launch_row_fp8;
RowLauncher launch_row_int8;
RowLauncher launch_row_bf16;
RowLauncher launch_row_fp16;

}  // namespace ringkernels::hopper_projection
