#include <tuple>

#include "launcher.h"

namespace lvtp::cuda {

static std::tuple<Tensor, Tensor> psca_op(Tensor features, int64_t groups, std::string center) {
  checks::psca(features, groups, center);
  const int64_t b = features.size(0), n = features.size(1), d = features.size(2);
  auto labels = empty(features, {b, n}, ScalarType::Long);
  auto loadings = empty(features, {b, n}, ScalarType::Float);
  if (b == 0) return {labels, loadings};
  const DeviceGuard guard(features.get_device_index());
  const auto x = ready(features);
  const auto scratch = workspace(x, psca_workspace(b, n, d, groups));
  STD_CUDA_CHECK(psca(
      x.const_data_ptr(), dtype_of(x), nullptr, b, n, d, groups, center == "feature", scratch.mutable_data_ptr(),
      data_out<int64_t>(labels), data_out<float>(loadings), current_stream(x)));
  return {labels, loadings};
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) { m.impl("psca", LVTP_KERNEL("psca", &lvtp::cuda::psca_op)); }
