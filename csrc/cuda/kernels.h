// The boundary between launchers (csrc/cuda/<op>.cpp, which know torch) and kernels (<op>.cu, which do not).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace lvtp::cuda {

enum class Dtype { kFloat, kHalf, kBFloat16 };

// features [images, n, d] contiguous -> out fp32 [images, n, n]; scale is workspace, fp32 [images, n].
cudaError_t cosine_similarity(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, float* scale, float* out,
    cudaStream_t stream);

}  // namespace lvtp::cuda
