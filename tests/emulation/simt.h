// A SIMT emulator: CUDA's words for the host compiler, so that the project's own .cu files run on a CPU, in CI, under a
// debugger and under AddressSanitizer. simt.cpp is the machine, include/ stands in for CUDA's headers (no toolkit is
// needed), build.py compiles, and test_emulator.py shows what is promised here.
//
// What it does
//   - every thread of a block is a fiber, which runs until it waits: at a block barrier, a warp collective, a cluster
//     barrier. Blocks run one after the other; those of a cluster, or of a cooperative launch, run together and can
//     reach each other's shared memory.
//   - which thread goes on is drawn from a seed: odd seeds let one favoured thread run as far ahead as it can, even
//   ones
//     draw anew every time. A missing barrier is therefore a wrong result under some seed.
//   - shared memory, static and dynamic, is filled with a poison that depends on the seed before each block.
//   - any barrier can be removed at run time, named by file and line (remove_barrier), which proves the tests' worth.
//   - an asynchronous copy destroys its destination when it is issued and brings the bytes when its thread waits for
//   them.
//     Waits for copies can be removed like barriers. include/ptx.h has these and the tensor cores' fragments.
//   - a wait that cannot end is an exception that says who waits where. It is stricter than the hardware: all threads
//   of
//     a block take part in a barrier, at the same line; all lanes named by a mask arrive, with the same mask.
// What it does not
//   - threads switch only where they wait, so a loop that spins until another thread writes would never end, and a race
//     between two writes without a barrier in between shows only in their order.
//   - memory is sequentially consistent, and at most 16 blocks run together.
//   - under AddressSanitizer blocks that run together share their static shared memory, so they use dynamic only.
#pragma once

#include <math.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// ----------------------------------------------------------------------------------------------------- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// Thread-local, so that a module's shared variables lie in one place, where the machine can poison them, and so that
// every block of a cluster, which has a system thread of its own, has them to itself. AddressSanitizer knows the bounds
// of plain static variables only.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------------ the machine

namespace simt {

struct Site {  // where a barrier or collective stands in the source
  const char* what;
  const char* file;
  int line;
};

// Waits for the lanes in `mask`, and returns what each deposited. The last to come does `together`, while all wait.
using Deposits = std::array<uint64_t, 32>;
const Deposits& exchange(
    const Site& site, unsigned mask, uint64_t deposit, void (*together)(const Deposits&) = nullptr);
// Waits for the block, and returns for how many of its threads `predicate` holds.
int block_barrier(const Site& site, bool predicate);
void cluster_barrier(const Site& site);
void team_barrier(const Site& site, const unsigned* team, unsigned blocks);  // by so many blocks, which name the same
// A copy of this thread's (zeros where `from` is null), which belongs to the group that end_copies() ends;
// await_copies() brings all but the last `pending` groups.
void copy_async(void* to, const void* from, size_t bytes);
void end_copies();
void await_copies(const Site& site, size_t pending);
[[noreturn]] void fail(const Site& site, const char* why);

unsigned lane();
unsigned cluster_rank();
unsigned cluster_size();
void* dynamic_shared();
void* shared_of(void* mine, unsigned rank);  // the same variable in another block of the cluster; dynamic shared memory

void run(dim3 grid, dim3 block, size_t dynamic_bytes, unsigned together, const std::function<void()>& thread);

// For tests.
void set_seed(uint64_t seed);
void remove_barrier(const std::string& file, int line);  // its name without folders; line 0: none is removed any more
std::vector<std::pair<std::string, int>> barriers();     // all that threads have waited at so far

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// `source`, a lane inside the caller's segment of `width`, or the caller where it lies outside.
template <class T>
T shuffle(const Site& site, unsigned mask, T value, int source, int width, bool wrap) {
  const int mine = static_cast<int>(lane()), base = mine & ~(width - 1);
  int from = wrap ? base + (source & (width - 1)) : source;
  if (from < base || from >= base + width) from = mine;
  const auto& seen = exchange(site, mask, to_bits(value));
  if (!(mask >> from & 1)) fail(site, "reads a lane that its mask does not name");
  return from_bits<T>(seen[from]);
}

template <class T, class F>
T reduce(const Site& site, unsigned mask, T value, const F& join) {
  const auto& seen = exchange(site, mask, to_bits(value));
  int first = 0;
  while (!(mask >> first & 1)) ++first;
  T all = from_bits<T>(seen[first]);
  for (int l = first + 1; l < 32; ++l) {
    if (mask >> l & 1) all = join(all, from_bits<T>(seen[l]));
  }
  return all;
}

}  // namespace simt

// --------------------------------------------------------------------------------------------- barriers, warps, votes

#define SIMT_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE \
  simt::Site { __func__, file, line }

inline void __syncthreads(SIMT_AT) { simt::block_barrier(SIMT_SITE, false); }
inline int __syncthreads_count(int p, SIMT_AT) { return simt::block_barrier(SIMT_SITE, p != 0); }
inline int __syncthreads_or(int p, SIMT_AT) { return simt::block_barrier(SIMT_SITE, p != 0) > 0; }
inline int __syncthreads_and(int p, SIMT_AT) { return simt::block_barrier(SIMT_SITE, p == 0) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_AT) { simt::exchange(SIMT_SITE, mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_AT) {
  return simt::shuffle(SIMT_SITE, mask, v, source, width, true);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, SIMT_AT) {
  return simt::shuffle(SIMT_SITE, mask, v, static_cast<int>(simt::lane()) ^ with, width, false);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_AT) {
  return simt::shuffle(SIMT_SITE, mask, v, static_cast<int>(simt::lane() - by), width, false);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, SIMT_AT) {
  return simt::shuffle(SIMT_SITE, mask, v, static_cast<int>(simt::lane() + by), width, false);
}

inline unsigned __ballot_sync(unsigned mask, int p, SIMT_AT) {
  const auto& seen = simt::exchange(SIMT_SITE, mask, p != 0);
  unsigned votes = 0;
  for (int l = 0; l < 32; ++l) votes |= static_cast<unsigned>((mask >> l & 1) && seen[l]) << l;
  return votes;
}
inline int __any_sync(unsigned mask, int p, SIMT_AT) {
  return simt::reduce(SIMT_SITE, mask, p != 0, [](bool a, bool b) { return a || b; });
}
inline int __all_sync(unsigned mask, int p, SIMT_AT) {
  return simt::reduce(SIMT_SITE, mask, p != 0, [](bool a, bool b) { return a && b; });
}

template <class T>
T __reduce_max_sync(unsigned mask, T v, SIMT_AT) {
  return simt::reduce(SIMT_SITE, mask, v, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, SIMT_AT) {
  return simt::reduce(SIMT_SITE, mask, v, [](T a, T b) { return b < a ? b : a; });
}
template <class T>
T __reduce_add_sync(unsigned mask, T v, SIMT_AT) {
  return simt::reduce(SIMT_SITE, mask, v, [](T a, T b) { return static_cast<T>(a + b); });
}

// --------------------------------------------------------------------------------------------- atomics and intrinsics

template <class T, class F>
T simt_atomic(T* at, const F& change) {
  const T before = *at;
  *at = change(before);
  return before;
}
template <class T>
T atomicAdd(T* at, T v) {
  return simt_atomic(at, [v](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMax(T* at, T v) {
  return simt_atomic(at, [v](T old) { return old < v ? v : old; });
}
template <class T>
T atomicMin(T* at, T v) {
  return simt_atomic(at, [v](T old) { return v < old ? v : old; });
}
template <class T>
T atomicOr(T* at, T v) {
  return simt_atomic(at, [v](T old) { return static_cast<T>(old | v); });
}
template <class T>
T atomicExch(T* at, T v) {
  return simt_atomic(at, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* at, T expected, T v) {
  return simt_atomic(at, [=](T old) { return old == expected ? v : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(unsigned v) { return __builtin_ffs(static_cast<int>(v)); }
inline int __clz(unsigned v) { return v == 0 ? 32 : __builtin_clz(v); }
inline unsigned __float_as_uint(float v) { return simt::from_bits<unsigned>(simt::to_bits(v)); }
inline float __uint_as_float(unsigned v) { return simt::from_bits<float>(v); }
template <class T>
T __ldg(const T* at) {
  return *at;
}

// -------------------------------------------------------------------------------------------------- the runtime's API

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }
inline cudaError_t cudaMemsetAsync(void* at, int byte, size_t count, cudaStream_t) {
  memset(at, byte, count);
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
  int cooperative;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

constexpr size_t kSimtDefaultShared = 48 << 10,
                 kSimtMostShared = 99 << 10;  // of sm_86, the smallest of those we promise
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return static_cast<size_t>(bytes) <= kSimtMostShared ? cudaSuccess : cudaErrorInvalidValue;
}

// A small device, whose multiprocessors hold a block each.
constexpr int kSimtMultiprocessors = 5;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = kSimtMultiprocessors, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t shared) {
  return *blocks = shared <= kSimtMostShared, cudaSuccess;
}

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > kSimtMostShared) return cudaErrorInvalidValue;
  unsigned together = 1;
  for (unsigned a = 0; a < config->numAttrs; ++a) {
    const auto& [id, value] = config->attrs[a];
    together = id == cudaLaunchAttributeClusterDimension ? value.clusterDim.x : grid.x;
    if (id == cudaLaunchAttributeCooperative && grid.x > kSimtMultiprocessors) return cudaErrorInvalidValue;
  }
  simt::run(grid, block, config->dynamicSmemBytes, together, [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}
