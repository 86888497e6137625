#include <numeric>
#include <vector>

#include "../shares.h"
#include "common.h"

namespace lvtp::cpu {

// The total shared among the images in proportion to phi = 1 - rho, each between `minimum` and N -> int64 [B].
static Tensor dynamic_budget_op(Tensor features, int64_t total, int64_t minimum) {
  checks::dynamic_budget(features, total, minimum);
  const int64_t b = features.size(0), tokens = features.size(1);
  const auto rho = mean_similarity(features, std::nullopt);
  const Shares shares{static_cast<double>(minimum), static_cast<double>(tokens)};
  const auto share = [&](int64_t i, double log_lambda) {
    return shares.of(Shares::phi(data<float>(rho)[i]), log_lambda);
  };
  double low = Shares::kLow, high = Shares::kHigh;
  for (int step = 0; step < Shares::kSteps; ++step) {
    const double middle = (low + high) / 2;
    double sum = 0.0;
    for (int64_t i = 0; i < b; ++i) sum += share(i, middle);
    (sum <= static_cast<double>(total) ? low : high) = middle;
  }

  auto out = empty(features, {b}, ScalarType::Long);
  int64_t* budget = data_out<int64_t>(out);
  std::vector<double> remainder(b);
  for (int64_t i = 0; i < b; ++i) {
    budget[i] = static_cast<int64_t>(share(i, low));
    remainder[i] = shares.remainder(share(i, low));
  }
  std::vector<int64_t> order(b);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return remainder[i] > remainder[j]; });
  const int64_t left = total - std::accumulate(budget, budget + b, int64_t{0});
  for (int64_t seat = 0; seat < left && seat < b; ++seat) ++budget[order[seat]];
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) {
  m.impl("dynamic_budget", LVTP_KERNEL("dynamic_budget", &lvtp::cpu::dynamic_budget_op));
}
