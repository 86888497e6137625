#include "launcher.h"

namespace lvtp::cuda {

static Tensor greedy_suppression_op(Tensor scores, Tensor similarity, int64_t k, double gamma, OptionalTensor mask) {
  checks::greedy_suppression(scores, similarity, k, gamma, mask);
  const int64_t b = scores.size(0), n = scores.size(1);
  auto picks = empty(scores, {b, k}, ScalarType::Long);
  if (b == 0) return picks;
  const DeviceGuard guard(scores.get_device_index());
  const auto s = ready(scores, ScalarType::Float), sim = ready_floats(similarity);
  const auto real = ready(mask);
  const auto scratch = workspace(s, greedy_suppression_workspace(b, n));
  STD_CUDA_CHECK(greedy_suppression(
      data<float>(s), false, sim.const_data_ptr(), dtype_of(sim), data_or_null(real), b, n, k, gamma,
      scratch.mutable_data_ptr(), data_out<int64_t>(picks), current_stream(s)));
  return picks;
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) {
  m.impl("greedy_suppression", LVTP_KERNEL("greedy_suppression", &lvtp::cuda::greedy_suppression_op));
}
