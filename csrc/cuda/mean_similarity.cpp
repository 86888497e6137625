#include "launcher.h"

namespace lvtp::cuda {

static Tensor mean_similarity_op(Tensor features, OptionalTensor mask) {
  checks::mean_similarity(features, mask);
  const int64_t b = features.size(0), n = features.size(1), d = features.size(2);
  auto out = empty(features, {b}, ScalarType::Float);
  if (b == 0) return out;
  const DeviceGuard guard(features.get_device_index());
  const auto x = ready(features);
  const auto real = ready(mask);
  const auto scratch = workspace(x, mean_similarity_workspace(b, n, d));
  STD_CUDA_CHECK(mean_similarity(
      x.const_data_ptr(), dtype_of(x), data_or_null(real), b, n, d, scratch.mutable_data_ptr(), data_out<float>(out),
      current_stream(x)));
  return out;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) {
  m.impl("mean_similarity", LVTP_KERNEL("mean_similarity", &lvtp::cuda::mean_similarity_op));
}
