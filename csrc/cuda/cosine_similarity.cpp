#include "launcher.h"

namespace lvtp::cuda {

static Tensor cosine_similarity_op(Tensor features) {
  checks::cosine_similarity(features);
  const int64_t b = features.size(0), n = features.size(1), d = features.size(2);
  auto out = empty(features, {b, n, n}, ScalarType::Float);
  if (b == 0) return out;
  const DeviceGuard guard(features.get_device_index());
  const auto x = ready(features);
  STD_CUDA_CHECK(cosine_similarity(x.const_data_ptr(), dtype_of(x), b, n, d, data_out<float>(out), current_stream(x)));
  return out;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) {
  m.impl("cosine_similarity", LVTP_KERNEL("cosine_similarity", &lvtp::cuda::cosine_similarity_op));
}
