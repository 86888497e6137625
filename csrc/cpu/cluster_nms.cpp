#include "common.h"
#include "nms.h"

namespace lvtp::cpu {

// scores, labels [B, N], similarity [B, N, N], threshold [B] -> kept, bool [B, N].
static Tensor cluster_nms(
    const Tensor& scores, const Tensor& labels, const Tensor& similarity, const Tensor& threshold,
    const OptionalTensor& mask) {
  const auto s = ready(scores, ScalarType::Float), sim = ready(similarity, ScalarType::Float);
  const auto tau = ready(threshold, ScalarType::Float), group = ready(labels);
  const int64_t b = s.size(0), n = s.size(1);
  const Mask present(mask, n);
  auto kept = empty(s, {b, n}, ScalarType::Bool);
  std::fill_n(data_out<bool>(kept), b * n, false);

  for_each_image(b, [&](int64_t image) {
    const float* rows = data<float>(sim) + image * n * n;
    Similarities source{[&](int64_t j, int64_t i) { return rows[i * n + j]; }};
    nms(data<float>(s) + image * n, data<int64_t>(group) + image * n, data<float>(tau)[image], present.tokens(image),
        source, data_out<bool>(kept) + image * n);
  });
  return kept;
}

static Tensor cluster_nms_per_image_op(
    Tensor scores, Tensor labels, Tensor similarity, Tensor threshold, OptionalTensor mask) {
  checks::cluster_nms(scores, labels, similarity, threshold, mask);
  check_labels("cluster_nms", labels, mask);
  return cluster_nms(scores, labels, similarity, threshold, mask);
}

static Tensor cluster_nms_op(Tensor scores, Tensor labels, Tensor similarity, double threshold, OptionalTensor mask) {
  checks::cluster_nms(scores, labels, similarity, std::nullopt, mask);
  check_labels("cluster_nms", labels, mask);
  const auto same = torch::stable::full({scores.size(0)}, threshold, ScalarType::Double);
  return cluster_nms(scores, labels, similarity, same, mask);
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) {
  m.impl("cluster_nms", LVTP_KERNEL("cluster_nms", &lvtp::cpu::cluster_nms_op));
  m.impl("cluster_nms.per_image", LVTP_KERNEL("cluster_nms", &lvtp::cpu::cluster_nms_per_image_op));
}
