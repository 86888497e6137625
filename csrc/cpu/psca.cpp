#include <tuple>
#include <vector>

#include "common.h"

namespace lvtp::cpu {

// A = sigmoid(features), centred, fp32 [N, D], of one image. Padding and tokens that are not finite become zero rows
// and do not count in the means over tokens. usable[i]: row i is not zero, so the token has a part in some component.
template <class T, class Present>
static void centred_sigmoid(
    const T* x, int64_t n, int64_t d, bool over_features, const Present& present, float* a, char* usable) {
  std::vector<double> token_mean(d, 0.0);
  int64_t counted = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0.0;
    bool finite = present(i);
    for (int64_t c = 0; c < d && finite; ++c) {
      const float v = static_cast<float>(x[i * d + c]);
      finite = std::isfinite(v);
      a[i * d + c] = 1.0f / (1.0f + std::exp(-v));
      sum += a[i * d + c];
    }
    usable[i] = finite;
    counted += finite;
    if (!finite) std::fill_n(a + i * d, d, 0.0f);
    const auto mean = static_cast<float>(sum / static_cast<double>(d));
    for (int64_t c = 0; c < d && finite; ++c) {
      token_mean[c] += a[i * d + c];
      if (over_features) a[i * d + c] -= mean;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    bool zero = true;
    for (int64_t c = 0; c < d && usable[i]; ++c) {
      if (!over_features) a[i * d + c] -= static_cast<float>(token_mean[c] / static_cast<double>(counted));
      zero = zero && a[i * d + c] == 0.0f;
    }
    usable[i] = !zero;
  }
}

// LAPACK may not converge where few tokens differ: rounding leaves entries near zero that it compares with each other.
// Adding the mean eigenvalue to all of them changes no eigenvector and gives it something to compare with.
static void add_mean_eigenvalue(double* gram, int64_t n) {
  double trace = 0.0;
  for (int64_t i = 0; i < n; ++i) trace += gram[i * (n + 1)];
  for (int64_t i = 0; i < n; ++i) gram[i * (n + 1)] += trace / static_cast<double>(n);
}

// Principal semantic component analysis (PruneSID, section 3): each token belongs to the principal component of the
// tokens' Gram matrix on which it loads most. -> labels int64 [B, N], |loading| fp32 [B, N].
// The eigenvectors are LAPACK's: exact, deterministic, and O(N^3).
std::pair<Tensor, Tensor> psca(
    const Tensor& features, int64_t groups, const std::string& center, const OptionalTensor& mask) {
  const auto x = ready(features);
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2);
  const Mask present(mask, n);
  auto a = empty_like_device(x, {b, n, d}, ScalarType::Float);
  std::vector<char> usable(b * n);
  with_features(x, [&](const auto* p) {
    for_each_image(b, [&](int64_t image) {
      centred_sigmoid(
          p + image * n * d, n, d, center == "feature", [&](int64_t i) { return present(image, i); },
          data_out<float>(a) + image * n * d, usable.data() + image * n);
    });
  });

  auto labels = empty_like_device(x, {b, n}, ScalarType::Long);
  auto loadings = empty_like_device(x, {b, n}, ScalarType::Float);
  // In double: trailing components lie close together, and fp32 would mix them (agreement 0.84 at G = 144).
  auto shifted = gram(ready(a, ScalarType::Double));
  for_each_image(b, [&](int64_t image) { add_mean_eigenvalue(data_out<double>(shifted) + image * n * n, n); });
  const auto vectors = ready(aten<2>("aten::linalg_eigh", "", shifted, std::string("L"))[1]);  // [B, N, N], ascending
  for_each_image(b, [&](int64_t image) {
    for (int64_t i = 0; i < n; ++i) {
      const double* v = data<double>(vectors) + (image * n + i) * n;
      int64_t best = 0;
      for (int64_t g = 1; g < groups; ++g) {
        if (std::fabs(v[n - 1 - g]) > std::fabs(v[n - 1 - best])) best = g;  // strict: ties to the lowest group
      }
      const bool grouped = usable[image * n + i];
      data_out<int64_t>(labels)[image * n + i] = grouped ? best : 0;
      data_out<float>(loadings)[image * n + i] = grouped ? static_cast<float>(std::fabs(v[n - 1 - best])) : 0.0f;
    }
  });
  return {labels, loadings};
}

static std::tuple<Tensor, Tensor> psca_op(Tensor features, int64_t groups, std::string center) {
  checks::psca(features, groups, center);
  auto [labels, loadings] = psca(features, groups, center, std::nullopt);
  return {labels, loadings};
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("psca", TORCH_BOX(&lvtp::cpu::psca_op)); }
