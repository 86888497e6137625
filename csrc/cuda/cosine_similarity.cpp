#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "kernels.h"

namespace lvtp::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

static Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default: return Dtype::kFloat;
  }
}

static cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

static Tensor cosine_similarity_op(Tensor features) {
  checks::cosine_similarity(features);
  const int64_t b = features.size(0), n = features.size(1), d = features.size(2);
  auto out = torch::stable::new_empty(features, {b, n, n}, ScalarType::Float);
  if (b == 0) return out;
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const auto x = features.is_contiguous() ? features : torch::stable::contiguous(features);
  const auto scale = torch::stable::new_empty(features, {b, n}, ScalarType::Float);
  STD_CUDA_CHECK(cosine_similarity(
      x.const_data_ptr(), dtype_of(x), b, n, d, static_cast<float*>(scale.mutable_data_ptr()),
      static_cast<float*>(out.mutable_data_ptr()), current_stream(x)));
  return out;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) { m.impl("cosine_similarity", TORCH_BOX(&lvtp::cuda::cosine_similarity_op)); }
