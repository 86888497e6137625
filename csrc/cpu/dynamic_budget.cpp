#include <numeric>
#include <vector>

#include "common.h"

namespace lvtp::cpu {

// The total shared among the images in proportion to phi = 1 - rho, each between `minimum` and N -> int64 [B].
static Tensor dynamic_budget_op(Tensor features, int64_t total, int64_t minimum) {
  checks::dynamic_budget(features, total, minimum);
  const int64_t b = features.size(0), tokens = features.size(1);
  const auto rho = mean_similarity(features, std::nullopt);
  // An image that repeats itself entirely takes part with so little that no other share changes: such images share
  // equally where nobody has any phi, and take what is left where all others are full.
  std::vector<double> phi(b);
  for (int64_t i = 0; i < b; ++i) phi[i] = std::max(1.0 - data<float>(rho)[i], 0x1p-100);
  const auto share = [&](int64_t i, double log_lambda) {
    return std::clamp(std::exp2(log_lambda) * phi[i], static_cast<double>(minimum), static_cast<double>(tokens));
  };

  // The sum of the clamped shares rises with lambda; its logarithm is bisected down to rounding.
  double low = -64.0, high = 192.0;
  for (int step = 0; step < 64; ++step) {
    const double middle = (low + high) / 2;
    double sum = 0.0;
    for (int64_t i = 0; i < b; ++i) sum += share(i, middle);
    (sum <= static_cast<double>(total) ? low : high) = middle;
  }

  auto out = empty_like_device(features, {b}, ScalarType::Long);
  int64_t* budget = data_out<int64_t>(out);
  std::vector<double> remainder(b);
  for (int64_t i = 0; i < b; ++i) {
    budget[i] = static_cast<int64_t>(share(i, low));
    remainder[i] = budget[i] < tokens ? share(i, low) - static_cast<double>(budget[i]) : -1.0;
  }
  std::vector<int64_t> order(b);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return remainder[i] > remainder[j]; });
  const int64_t left = total - std::accumulate(budget, budget + b, int64_t{0});
  for (int64_t seat = 0; seat < left && seat < b; ++seat) ++budget[order[seat]];
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("dynamic_budget", TORCH_BOX(&lvtp::cpu::dynamic_budget_op)); }
