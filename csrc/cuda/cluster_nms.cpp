#include "launcher.h"

namespace lvtp::cuda {

// A threshold an image, or `threshold` for all of them.
static Tensor cluster_nms(
    const Tensor& scores, const Tensor& labels, const Tensor& similarity, const OptionalTensor& thresholds,
    double threshold, const OptionalTensor& mask) {
  checks::cluster_nms(scores, labels, similarity, thresholds, mask);
  const int64_t b = scores.size(0), n = scores.size(1);
  auto kept = empty(scores, {b, n}, ScalarType::Bool);
  if (b == 0) return kept;
  const DeviceGuard guard(scores.get_device_index());
  const auto s = ready(scores, ScalarType::Float), group = ready(labels), sim = ready_floats(similarity);
  const auto real = ready(mask);
  const auto each = thresholds ? OptionalTensor(ready(*thresholds, ScalarType::Float)) : thresholds;
  const auto scratch = workspace(s, cluster_nms_workspace(b, n));
  STD_CUDA_CHECK(cluster_nms(
      data<float>(s), data<int64_t>(group), sim.const_data_ptr(), dtype_of(sim), each ? data<float>(*each) : nullptr,
      static_cast<float>(threshold), data_or_null(real), b, n, scratch.mutable_data_ptr(), data_out<bool>(kept),
      current_stream(s)));
  return kept;
}

static Tensor cluster_nms_op(Tensor scores, Tensor labels, Tensor similarity, double threshold, OptionalTensor mask) {
  return cluster_nms(scores, labels, similarity, std::nullopt, threshold, mask);
}

static Tensor cluster_nms_per_image_op(
    Tensor scores, Tensor labels, Tensor similarity, Tensor threshold, OptionalTensor mask) {
  return cluster_nms(scores, labels, similarity, threshold, 0.0, mask);
}

}  // namespace lvtp::cuda

STABLE_TORCH_LIBRARY_IMPL(lvtp, CUDA, m) {
  m.impl("cluster_nms", LVTP_KERNEL("cluster_nms", &lvtp::cuda::cluster_nms_op));
  m.impl("cluster_nms.per_image", LVTP_KERNEL("cluster_nms", &lvtp::cuda::cluster_nms_per_image_op));
}
