// What the kernels share: features as floats, sums over a warp, unit vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels.h"
#include "launch.h"

namespace lvtp::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline float value(float v) { return v; }
__device__ inline float value(__half v) { return __half2float(v); }
__device__ inline float value(__nv_bfloat16 v) { return __bfloat162float(v); }

// Bits that look random, the same in every run.
__device__ inline uint32_t scrambled(uint32_t at) {
  uint32_t bits = at + 1u;
  for (int round = 0; round < 3; ++round) bits = (bits ^ bits >> 16) * 0x45d9f3bu;
  return bits;
}

// The sum over a warp, in every lane.
template <class T>
__device__ T warp_sum(T v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// The sum over a block, in every thread, in a fixed order; `warps` may be used again after one more barrier.
template <int kMostWarps>
__device__ double block_sum(double v, double (&warps)[kMostWarps]) {
  v = warp_sum(v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();  // every warp has entered its sum
  return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0);
}

// 1 / max(||x||, 1e-12) of one token, or 0 where it is all zero or not finite, in every lane of a warp. The sum is in
// double, so finite features never overflow.
template <class T>
__device__ float unit_scale_of(const T* x, int64_t d, int lane) {
  double sum = 0.0;
  for (int64_t c = lane; c < d; c += 32) {
    const double v = value(x[c]);
    sum += v * v;
  }
  sum = warp_sum(sum);
  return isfinite(sum) && sum > 0.0 ? 1.0f / fmaxf(static_cast<float>(sqrt(sum)), 1e-12f) : 0.0f;
}

// A warp a token.
template <class T>
__global__ void unit_scale(const T* __restrict__ x, int64_t tokens, int64_t d, float* __restrict__ scale) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (token >= tokens) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  const float s = unit_scale_of(x + token * d, d, lane);
  if (lane == 0) scale[token] = s;
}

template <class T>
cudaError_t launch_unit_scale(const T* x, int64_t tokens, int64_t d, float* scale, cudaStream_t stream) {
  constexpr int kThreads = 256;
  return launch(unit_scale<T>, blocks(ceil_div(tokens, kThreads / 32)), kThreads, 0, stream, x, tokens, d, scale);
}

}  // namespace

// fn(pointer to the dtype's elements), where fn returns a cudaError_t.
template <class F>
cudaError_t with_dtype(const void* data, Dtype dtype, const F& fn) {
  switch (dtype) {
    case Dtype::kHalf: return fn(static_cast<const __half*>(data));
    case Dtype::kBFloat16: return fn(static_cast<const __nv_bfloat16*>(data));
    default: return fn(static_cast<const float*>(data));
  }
}

}  // namespace lvtp::cuda
