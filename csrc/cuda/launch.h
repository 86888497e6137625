// The one way a kernel is launched. cudaLaunchKernelEx is an ordinary function, which the emulator has too; <<<>>> is
// not.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace lvtp::cuda {

// `shared` counts the bytes of dynamic shared memory; more than the 48 KiB that every kernel may have are asked for.
template <class... Params, class... Args>
cudaError_t launch(
    void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, Args&&... args) {
  constexpr size_t kAlwaysThere = 48 << 10;
  if (shared > kAlwaysThere) {
    const auto bytes = static_cast<int>(shared);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// Leaves the function with the error of `call`, if it is one.
#define LVTP_TRY(call) \
  if (const cudaError_t error = call; error != cudaSuccess) return error

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Workspace in pieces, each aligned to 256 bytes; without a base it counts only.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(base + used);
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return piece;
  }
};

// A grid's x, which holds 2^31 - 1 blocks. More become a grid of 0, whose launch fails.
inline unsigned blocks(int64_t count) { return count <= INT32_MAX ? static_cast<unsigned>(count) : 0; }

}  // namespace lvtp::cuda
