// Step 1 of ID-Selection, by a block.
#pragma once

#include "device.cuh"

namespace lvtp::cuda {
namespace {

// Importance to [0, 1] over the finite values of the real tokens; as it is where they are all alike or their difference
// overflows. +Inf becomes 2 and -Inf 0; a NaN stays one, for finite_score to put last.
struct Scaling {
  float low = 0.0f, spread = 0.0f;
  __device__ float of(float importance) const {
    if (isinf(importance)) return importance > 0.0f ? 2.0f : 0.0f;
    return spread > 1e-9f && spread < INFINITY ? (importance - low) / spread : importance;
  }
};

// The same in every thread of the block, all of which takes part.
template <class Real>
__device__ Scaling scaling_of(const float* importance, int n, const Real& real) {
  __shared__ float lows[32], highs[32];
  float low = INFINITY, high = -INFINITY;
  for (int j = threadIdx.x; j < n; j += static_cast<int>(blockDim.x)) {
    if (!isfinite(importance[j]) || !real(j)) continue;
    low = fminf(low, importance[j]);
    high = fmaxf(high, importance[j]);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, offset));
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, offset));
  }
  if (threadIdx.x % 32 == 0) {
    lows[threadIdx.x / 32] = low;
    highs[threadIdx.x / 32] = high;
  }
  __syncthreads();  // every warp has entered its range
  for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) {
    low = fminf(low, lows[w]);
    high = fmaxf(high, highs[w]);
  }
  return {low, high - low};  // a spread of -inf where nothing is finite
}

}  // namespace
}  // namespace lvtp::cuda
