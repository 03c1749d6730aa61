// Number formats and status codes shared by all kernels. No CUDA, TensorRT or torch header here.
#pragma once

#include <cstddef>
#include <cstdint>

// The stream type of the CUDA runtime, declared as the runtime does, so that hosts need no CUDA header.
struct CUstream_st;

namespace ringkernels {

using Stream = CUstream_st*;

enum class DType : int32_t {
  kFloat32 = 0,
  kFloat16 = 1,
  kBFloat16 = 2,
  kFp8E4M3 = 3,
  kInt8 = 4,
};

// Which elements share a scale; real = code * scale.
enum class ScaleKind : int32_t {
  kNone = 0,     // not quantized
  kTensor = 1,   // one fp32 scale
  kChannel = 2,  // weights: one per output channel [N]; activations: one per token [M]
  kBlock128 = 3, // weights [ceil(N/128), ceil(K/128)]; activations [M, ceil(K/128)]; edges ragged
};

enum class StatusCode : int32_t {
  kOk = 0,
  kBadShape = 1,      // a size is out of range or does not divide
  kBadType = 2,       // a dtype or scale kind that no instantiation serves
  kNullPointer = 3,   // a required pointer is null
  kMisaligned = 4,    // a pointer or stride is not a multiple of 16 bytes
  kWorkspace = 5,     // the workspace is smaller than workspace_bytes()
  kUnsupported = 6,   // this GPU has no kernel for it
  kLaunchFailed = 7,  // the CUDA runtime refused the launch
};

// Result of validate() and launch(). `field` names the member of Params that is wrong, or the CUDA error.
struct Status {
  StatusCode code = StatusCode::kOk;
  const char* field = "";
  const char* expected = "";
  int64_t got = 0;

  constexpr bool ok() const { return code == StatusCode::kOk; }
};

constexpr size_t size_of(DType type) {
  switch (type) {
    case DType::kFloat32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    default: return 1;
  }
}

constexpr bool is_8bit(DType type) { return type == DType::kFp8E4M3 || type == DType::kInt8; }

}  // namespace ringkernels
