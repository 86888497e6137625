#include <algorithm>

#include "launcher.h"

namespace lvtp::cuda {

static Tensor prune_sid_op(
    Tensor features, OptionalTensor importance, int64_t n, int64_t reserved, std::string center, OptionalTensor labels,
    OptionalTensor mask) {
  checks::prune_sid(features, importance, n, reserved, center, labels, mask);
  const int64_t b = features.size(0), tokens = features.size(1), d = features.size(2);
  const int64_t groups = std::max<int64_t>(1, std::min(n / 4, tokens));
  auto picks = empty(features, {b, std::min(n - reserved, tokens)}, ScalarType::Long);
  if (b == 0) return picks;
  const DeviceGuard guard(features.get_device_index());
  const auto x = ready(features);
  const auto scores = importance ? OptionalTensor(ready(*importance, ScalarType::Float)) : importance;
  const auto group = ready(labels), real = ready(mask);
  const auto scratch = workspace(x, prune_sid_workspace(b, tokens, d, groups, !labels));
  STD_CUDA_CHECK(prune_sid(
      x.const_data_ptr(), dtype_of(x), scores ? data<float>(*scores) : nullptr, group ? data<int64_t>(*group) : nullptr,
      data_or_null(real), b, tokens, d, groups, n, reserved, center == "feature", scratch.mutable_data_ptr(),
      data_out<int64_t>(picks), current_stream(x)));
  return picks;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) { m.impl("prune_sid", LVTP_KERNEL("prune_sid", &lvtp::cuda::prune_sid_op)); }
