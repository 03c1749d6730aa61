// One way to launch a kernel: checks the launch, and chains it to the kernel before (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

#include "ringkernels/types.h"

namespace ringkernels {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;
  Stream stream = nullptr;
  bool programmatic = false;  // the kernel calls wait_for_previous_kernel() before it reads its inputs
  unsigned cluster = 1;       // blocks per cluster along x (sm_90 and newer)
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

inline Status cuda_status(cudaError_t error) {
  if (error == cudaSuccess) return Status{};
  cudaGetLastError();  // told to the caller here: nobody else who asks the runtime shall find it
  return Status{StatusCode::kLaunchFailed, cudaGetErrorString(error), "a successful launch", (int64_t)error};
}

// With RINGKERNELS_PORTABLE_ONLY a GPU of sm_90 runs what serves the GPUs without its instructions, in the
// least shared memory that any of them gives a block: for tests.
#ifdef RINGKERNELS_PORTABLE_ONLY
constexpr bool kPortableOnly = true;
#else
constexpr bool kPortableOnly = false;
#endif

// Shared memory that a block of this device may ask for.
inline cudaError_t shared_bytes_per_block(int device, int* bytes) {
  constexpr int kLeast = 99 * 1024;  // of sm_86, 89 and 120
  const cudaError_t error = cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (kPortableOnly && *bytes > kLeast) *bytes = kLeast;
  return error;
}

template <typename... Params, typename... Args>
Status launch_kernel(void (*kernel)(Params...), const LaunchShape& shape, Args&&... args) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shape.shared_bytes);
    if (error == cudaErrorInvalidValue) {
      cudaGetLastError();
      return Status{StatusCode::kUnsupported, "shared memory", "no more bytes than this GPU gives a block",
                    (int64_t)shape.shared_bytes};
    }
    if (error != cudaSuccess) return cuda_status(error);
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (shape.programmatic && !kPortableOnly) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = shape.stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// Device side of programmatic dependent launch. Before the wait a kernel may only touch what no earlier kernel
// of the stream writes: weights, scales, tables.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start its blocks; it still waits until this kernel has ended before it reads. Called
// after the wait: blocks that come in while the kernel ahead is still at work slow that one and this one down
// by microseconds, unless they bring many weights of their own.
__device__ __forceinline__ void allow_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ringkernels
