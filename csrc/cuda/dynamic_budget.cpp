#include "launcher.h"

namespace lvtp::cuda {

static Tensor dynamic_budget_op(Tensor features, int64_t total, int64_t minimum) {
  checks::dynamic_budget(features, total, minimum);
  const int64_t b = features.size(0), n = features.size(1), d = features.size(2);
  auto budget = empty(features, {b}, ScalarType::Long);
  if (b == 0) return budget;
  const DeviceGuard guard(features.get_device_index());
  const auto x = ready(features);
  const auto scratch = workspace(x, dynamic_budget_workspace(b, n, d));
  STD_CUDA_CHECK(dynamic_budget(
      x.const_data_ptr(), dtype_of(x), b, n, d, total, minimum, scratch.mutable_data_ptr(), data_out<int64_t>(budget),
      current_stream(x)));
  return budget;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) {
  m.impl("dynamic_budget", LVTP_KERNEL("dynamic_budget", &lvtp::cuda::dynamic_budget_op));
}
