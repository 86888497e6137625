#include "device.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;   // outputs a block computes: kTile x kTile
constexpr int kDepth = 16;  // features a step brings into shared memory
constexpr int kPatch = 4;   // outputs a thread computes: kPatch x kPatch

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

}  // namespace

cudaError_t scaled_gram(
    const void* features, Dtype dtype, const float* scale, int64_t images, int64_t n, int64_t d, float* out,
    cudaStream_t stream) {
  const int64_t across = ceil_div(n, kTile), per_image = across * (across + 1) / 2;
  return with_dtype(features, dtype, [&](const auto* x) {
    return launch(
        similarity_tiles<std::decay_t<decltype(*x)>>, blocks(images * per_image), kThreads, 0, stream, x, scale, n, d,
        per_image, out);
  });
}

cudaError_t cosine_similarity(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, float* scale, float* out,
    cudaStream_t stream) {
  LVTP_TRY(
      with_dtype(features, dtype, [&](const auto* x) { return launch_unit_scale(x, images * n, d, scale, stream); }));
  return scaled_gram(features, dtype, scale, images, n, d, out, stream);
}

}  // namespace lvtp::cuda
