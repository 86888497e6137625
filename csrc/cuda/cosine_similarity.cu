#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // outputs a block computes: kTile x kTile
constexpr int kDepth = 16;  // features a step brings into shared memory
constexpr int kPatch = 4;   // outputs a thread computes: kPatch x kPatch

__device__ float value(float v) { return v; }
__device__ float value(__half v) { return __half2float(v); }
__device__ float value(__nv_bfloat16 v) { return __bfloat162float(v); }

// scale[i] = 1 / max(||x_i||, 1e-12), or 0 for a token that is all zero or not finite. One warp a token; the sum is in
// double, so finite features never overflow.
template <class T>
__global__ void unit_scale(const T* __restrict__ x, int64_t tokens, int64_t d, float* __restrict__ scale) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (token >= tokens) return;  // the whole warp
  const int lane = threadIdx.x % 32;
  double sum = 0.0;
  for (int64_t c = lane; c < d; c += 32) {
    const double v = value(x[token * d + c]);
    sum += v * v;
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (lane == 0) {
    const bool usable = isfinite(sum) && sum > 0.0;
    scale[token] = usable ? 1.0f / fmaxf(static_cast<float>(sqrt(sum)), 1e-12f) : 0.0f;
  }
}

// Unit values of kTile tokens from `first`, kDepth features from `c0`, into shared memory, transposed.
template <class T>
__device__ void load_tile(
    const T* x, const float* scale, int64_t first, int64_t n, int64_t c0, int64_t d,
    float (&tile)[kDepth][kTile + 1]) {  // + 1: a column's words lie in different banks
  for (int e = threadIdx.x; e < kTile * kDepth; e += kThreads) {
    const int r = e / kDepth, c = e % kDepth;
    const int64_t token = first + r;
    const float s = token < n && c0 + c < d ? scale[token] : 0.0f;
    tile[c][r] = s > 0.0f ? value(x[token * d + c0 + c]) * s : 0.0f;  // a NaN times 0 would stay NaN
  }
}

// One block a tile of the upper triangle of one image; the tile below the diagonal is its mirror image.
template <class T>
__global__ void __launch_bounds__(kThreads) similarity_tiles(
    const T* __restrict__ x, const float* __restrict__ scale, int64_t n, int64_t d, int64_t tiles_per_image,
    float* __restrict__ out) {
  const int64_t image = blockIdx.x / tiles_per_image;
  int64_t tile = blockIdx.x % tiles_per_image, across = (n + kTile - 1) / kTile, row = 0;
  for (; tile >= across - row; ++row) tile -= across - row;
  const int64_t i0 = row * kTile, j0 = (row + tile) * kTile;
  x += image * n * d;
  scale += image * n;
  out += image * n * n;

  __shared__ float a[kDepth][kTile + 1], b[kDepth][kTile + 1];
  const int ti = threadIdx.x / (kTile / kPatch), tj = threadIdx.x % (kTile / kPatch);
  float sum[kPatch][kPatch] = {};
  for (int64_t c0 = 0; c0 < d; c0 += kDepth) {
    load_tile(x, scale, i0, n, c0, d, a);
    load_tile(x, scale, j0, n, c0, d, b);
    __syncthreads();  // the tiles are complete
#pragma unroll
    for (int c = 0; c < kDepth; ++c) {
#pragma unroll
      for (int p = 0; p < kPatch; ++p) {
#pragma unroll
        for (int q = 0; q < kPatch; ++q) sum[p][q] += a[c][ti * kPatch + p] * b[c][tj * kPatch + q];
      }
    }
    __syncthreads();  // the tiles have been read and may be overwritten
  }

#pragma unroll
  for (int p = 0; p < kPatch; ++p) {
#pragma unroll
    for (int q = 0; q < kPatch; ++q) {
      const int64_t i = i0 + ti * kPatch + p, j = j0 + tj * kPatch + q;
      if (i >= n || j >= n) continue;
      out[i * n + j] = sum[p][q];
      out[j * n + i] = sum[p][q];
    }
  }
}

template <class T>
cudaError_t launch(const T* x, int64_t images, int64_t n, int64_t d, float* scale, float* out, cudaStream_t stream) {
  const int64_t tokens = images * n, across = (n + kTile - 1) / kTile, tiles = across * (across + 1) / 2;
  const auto warps = static_cast<unsigned>((tokens + kThreads / 32 - 1) / (kThreads / 32));
  unit_scale<<<warps, kThreads, 0, stream>>>(x, tokens, d, scale);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  similarity_tiles<<<static_cast<unsigned>(images * tiles), kThreads, 0, stream>>>(x, scale, n, d, tiles, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t cosine_similarity(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, float* scale, float* out,
    cudaStream_t stream) {
  switch (dtype) {
    case Dtype::kHalf: return launch(static_cast<const __half*>(features), images, n, d, scale, out, stream);
    case Dtype::kBFloat16: return launch(static_cast<const __nv_bfloat16*>(features), images, n, d, scale, out, stream);
    default: return launch(static_cast<const float*>(features), images, n, d, scale, out, stream);
  }
}

}  // namespace lvtp::cuda
