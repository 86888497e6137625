// The ways a kernel is launched. cudaLaunchKernelEx is an ordinary function, which the emulator has too; <<<>>> is not.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace lvtp::cuda {

// Leaves the function with the error of `call`, if it is one.
#define LVTP_TRY(call) \
  if (const cudaError_t error = call; error != cudaSuccess) return error

// Dynamic shared memory beyond the 48 KiB that every kernel may have is asked for.
template <class... Params>
cudaError_t allow_shared(void (*kernel)(Params...), size_t bytes) {
  constexpr size_t kAlwaysThere = 48 << 10;
  if (bytes <= kAlwaysThere) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

inline cudaLaunchConfig_t configured(dim3 grid, unsigned threads, size_t shared, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return config;
}

// `shared` counts the bytes of dynamic shared memory.
template <class... Params, class... Args>
cudaError_t launch(
    void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared, cudaStream_t stream, Args&&... args) {
  LVTP_TRY(allow_shared(kernel, shared));
  const cudaLaunchConfig_t config = configured(grid, threads, shared, stream);
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// The blocks of a kernel that are on the device at a time: as many may wait for each other.
template <class... Params>
cudaError_t blocks_at_a_time(void (*kernel)(Params...), unsigned threads, size_t shared, int64_t& count) {
  LVTP_TRY(allow_shared(kernel, shared));
  int device = 0, multiprocessors = 0, each = 0;
  LVTP_TRY(cudaGetDevice(&device));
  LVTP_TRY(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  LVTP_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(threads), shared));
  count = int64_t{each} * multiprocessors;
  return count > 0 ? cudaSuccess : cudaErrorInvalidConfiguration;
}

// Blocks in teams of `parts`, at most `most`, each team for every count-th image; `room` is at least 1.
struct Teams {
  int64_t count;
  int parts;
  unsigned blocks() const { return static_cast<unsigned>(count * parts); }
};
inline Teams teams_of(int64_t room, int64_t images, int64_t most) {
  const int64_t each = images < room ? room / images : 1;
  const int64_t parts = each < most ? each : most;
  return {images < room / parts ? images : room / parts, static_cast<int>(parts)};
}

// A launch of at most so many blocks, which are all there at a time: team_barrier() (ptx.cuh) is for them.
template <class... Params, class... Args>
cudaError_t launch_together(
    void (*kernel)(Params...), unsigned grid, unsigned threads, size_t shared, cudaStream_t stream, Args&&... args) {
  LVTP_TRY(allow_shared(kernel, shared));
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = configured(grid, threads, shared, stream);
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

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
