#include <vector>

#include "common.h"

namespace lvtp::cpu {

// rho = (||sum_i x^_i||^2 - sum_i ||x^_i||^2) / (N (N - 1)) over the real tokens: the mean off-diagonal entry of the
// similarity matrix, without the matrix. fp32 [B]; 0 where there is no pair.
Tensor mean_similarity(const Tensor& features, const OptionalTensor& mask) {
  const auto unit = unit_features(features);
  const int64_t b = unit.size(0), n = unit.size(1), d = unit.size(2);
  const Mask present(mask, n);
  auto out = empty_like_device(unit, {b}, ScalarType::Float);

  const auto dot = best_dot<float>();
  for_each_image(b, [&](int64_t image) {
    std::vector<double> sum(d, 0.0);
    double own = 0.0;  // sum_i ||x^_i||^2: 1 for every token but the unusable ones
    int64_t real = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (!present(image, i)) continue;
      ++real;
      const float* row = data<float>(unit) + (image * n + i) * d;
      own += dot(row, row, d);
      for (int64_t c = 0; c < d; ++c) sum[c] += row[c];
    }
    double all = 0.0;
    for (const double s : sum) all += s * s;
    const double pairs = static_cast<double>(real) * static_cast<double>(real - 1);
    data_out<float>(out)[image] = real < 2 ? 0.0f : static_cast<float>((all - own) / pairs);
  });
  return out;
}

static Tensor mean_similarity_op(Tensor features, OptionalTensor mask) {
  checks::mean_similarity(features, mask);
  return mean_similarity(features, mask);
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("mean_similarity", TORCH_BOX(&lvtp::cpu::mean_similarity_op)); }
