#include <vector>

#include "common.h"
#include "gram.h"
#include "team.h"

namespace lvtp::cpu {

// rho = (||sum_i x^_i||^2 - sum_i ||x^_i||^2) / (N (N - 1)) over the real tokens of one image: the mean off-diagonal
// entry of the similarity matrix, without the matrix. 0 where there is no pair.
template <class T>
static float mean_similarity(Team& team, const T* x, int64_t d, const std::vector<int32_t>& tokens) {
  const auto real = static_cast<int64_t>(tokens.size());
  if (real < 2) return 0.0f;
  // Partial sums over fixed parts of the tokens, so that the order of additions does not depend on the threads.
  const int64_t parts = std::min<int64_t>(strips(real), 8);
  std::vector<double> sums(parts * d), own(parts);  // own: sum_i ||x^_i||^2, 1 for every token but the unusable ones
  team.run(parts, [&](int64_t part) {
    const auto dots = best_dots<T>();
    const Array<float> row(d);
    for (int64_t t = real * part / parts; t < real * (part + 1) / parts; ++t) {
      const T* token = x + tokens[t] * d;
      const float scale = unit_scale(token, d, dots).scale;
      if (scale == 0.0f) continue;
      to_float(token, d, row.get());
      own[part] += simd().accumulate_unit(row.get(), d, scale, sums.data() + part * d);
    }
  });
  double all = 0.0, diagonal = 0.0;
  for (int64_t c = 0; c < d; ++c) {
    double sum = 0.0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[part * d + c];
    all += sum * sum;
  }
  for (const double o : own) diagonal += o;
  return static_cast<float>((all - diagonal) / (static_cast<double>(real) * static_cast<double>(real - 1)));
}

// -> fp32 [B].
Tensor mean_similarity(const Tensor& features, const OptionalTensor& mask) {
  const auto x = ready(features);
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2);
  const Mask present(mask, n);
  auto out = empty(x, {b}, ScalarType::Float);
  auto* rho = data_out<float>(out);
  with_features(x, [&](const auto* p) {
    Team::for_each_image(b, [&](int64_t image, Team& team) {
      rho[image] = mean_similarity(team, p + image * n * d, d, present.tokens(image));
    });
  });
  return out;
}

static Tensor mean_similarity_op(Tensor features, OptionalTensor mask) {
  checks::mean_similarity(features, mask);
  return mean_similarity(features, mask);
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) {
  m.impl("mean_similarity", LVTP_KERNEL("mean_similarity", &lvtp::cpu::mean_similarity_op));
}
