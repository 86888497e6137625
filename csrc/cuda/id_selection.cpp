#include "launcher.h"

namespace lvtp::cuda {

static Tensor id_selection_op(Tensor features, Tensor importance, int64_t k, double gamma, OptionalTensor mask) {
  checks::id_selection(features, importance, k, gamma, mask);
  const int64_t b = features.size(0), n = features.size(1), d = features.size(2);
  auto picks = empty(features, {b, k}, ScalarType::Long);
  if (b == 0) return picks;
  const DeviceGuard guard(features.get_device_index());
  const auto x = ready(features), s = ready(importance, ScalarType::Float);
  const auto real = ready(mask);
  const auto scratch = workspace(x, id_selection_workspace(b, n));
  STD_CUDA_CHECK(id_selection(
      x.const_data_ptr(), dtype_of(x), data<float>(s), data_or_null(real), b, n, d, k, gamma,
      scratch.mutable_data_ptr(), data_out<int64_t>(picks), current_stream(x)));
  return picks;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) {
  m.impl("id_selection", LVTP_KERNEL("id_selection", &lvtp::cuda::id_selection_op));
}
