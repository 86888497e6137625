#include <algorithm>
#include <vector>

#include "common.h"
#include "greedy.h"

namespace lvtp::cpu {

// From this many tokens on, one image is worth several threads.
constexpr int64_t kWorthSharing = 2048;

// Step 1 of ID-Selection: importance to [0, 1] over the finite values of the real tokens; as it is where they are all
// alike or their difference overflows. +Inf becomes 2 and -Inf 0; a NaN stays one, for finite_score to put last.
static std::vector<Suppression::State> scaled(const float* importance, const std::vector<int32_t>& tokens) {
  float low = INFINITY, high = -INFINITY;
  for (const int32_t j : tokens) {
    if (!std::isfinite(importance[j])) continue;
    low = std::min(low, importance[j]);
    high = std::max(high, importance[j]);
  }
  const float spread = high - low;  // -inf where nothing is finite
  const bool scale = spread > 1e-9f && spread < INFINITY;
  std::vector<Suppression::State> states;
  for (const int32_t j : tokens) {
    const float s = importance[j];
    states.push_back({finite_score(std::isinf(s) ? (s > 0 ? 2.0f : 0.0f) : scale ? (s - low) / spread : s)});
  }
  return states;
}

// features [B, N, D], importance [B, N] -> int64 [B, k] in pick order, -1 after the last real token.
static Tensor id_selection_op(Tensor features, Tensor importance, int64_t k, double gamma, OptionalTensor mask) {
  checks::id_selection(features, importance, k, gamma, mask);
  const auto x = ready(features), s = ready(importance, ScalarType::Float);
  const int64_t b = x.size(0), n = x.size(1), d = x.size(2);
  const Mask present(mask, n);
  auto out = empty(x, {b, k}, ScalarType::Long);

  with_features(x, [&](const auto* p) {
    const auto select = [&](int64_t image, Team* team) {
      const auto tokens = present.tokens(image);
      Cosines cosine(p + image * n * d, n, d, team);
      int64_t* picks = data_out<int64_t>(out) + image * k;
      std::fill_n(picks, k, -1);
      greedy(
          suppression(gamma), tokens, scaled(data<float>(s) + image * n, tokens), k, cosine,
          [&](int64_t step, int64_t i) { picks[step] = i; });
    };
    if (n >= kWorthSharing) {
      Team::for_each_image(b, [&](int64_t image, Team& team) { select(image, &team); });
    } else {
      for_each_image(b, [&](int64_t image) { select(image, nullptr); });
    }
  });
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) {
  m.impl("id_selection", LVTP_KERNEL("id_selection", &lvtp::cpu::id_selection_op));
}
