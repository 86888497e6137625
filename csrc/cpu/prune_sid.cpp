#include <memory>
#include <vector>

#include "../quotas.h"
#include "common.h"
#include "nms.h"

namespace lvtp::cpu {

// Steps 5 to 7 for one image: quotas a group, then from each group its quota, what NMS kept first, the rest by score;
// written in ascending order, -1 after the last where the image has fewer real tokens than places.
template <class Present>
static void pick_by_quota(
    const float* scores, const int64_t* labels, const bool* kept, int64_t tokens, int64_t groups, int64_t n,
    int64_t reserved, const Present& present, int64_t* picks) {
  std::vector<int32_t> size(groups, 0), kept_in(groups, 0), up(groups), quota(groups);
  std::vector<int64_t> order;  // real tokens, best first
  for (int64_t i = 0; i < tokens; ++i) {
    if (!present(i)) continue;
    ++size[labels[i]];
    kept_in[labels[i]] += kept[i];
    order.push_back(i);
  }
  const int64_t places = std::min(n - reserved, tokens);
  // Beyond any number of tokens only n - reserved counts; the arithmetic of quotas() then stays far from its limits.
  constexpr int64_t kPlenty = int64_t{1} << 40;
  const int64_t patches = std::min(n - reserved, kPlenty);
  n = std::min(n - patches, kPlenty) + patches;
  reserved = n - patches;
  const int64_t target = std::min(places, static_cast<int64_t>(order.size()));
  quotas(size.data(), kept_in.data(), static_cast<int32_t>(groups), n, reserved, target, up.data(), quota.data());

  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    if (kept[a] != kept[b]) return kept[a];
    if (std::isnan(scores[a])) return false;  // a NaN score comes last
    return std::isnan(scores[b]) || scores[a] > scores[b];
  });
  std::vector<char> taken(tokens, 0);
  for (const int64_t i : order) taken[i] = quota[labels[i]]-- > 0;

  std::fill_n(picks, places, -1);
  for (int64_t i = 0; i < tokens; ++i) {
    if (taken[i]) *picks++ = i;
  }
}

// features [B, N, D], importance [B, N] or none (the loadings then) -> int64 [B, min(n - reserved, N)], ascending.
static Tensor prune_sid_op(
    Tensor features, OptionalTensor importance, int64_t n, int64_t reserved, std::string center, OptionalTensor labels,
    OptionalTensor mask) {
  checks::prune_sid(features, importance, n, reserved, center, labels, mask);
  const int64_t b = features.size(0), tokens = features.size(1);
  const int64_t groups = std::max<int64_t>(1, std::min(n / 4, tokens));

  Tensor group, scores;
  if (labels) {
    check_labels("prune_sid", *labels, mask, groups);
    group = ready(*labels);
    scores = ready(*importance, ScalarType::Float);
  } else {
    const auto [component, loadings] = psca(features, groups, center, mask);
    group = component;
    scores = importance ? ready(*importance, ScalarType::Float) : loadings;
  }

  const auto x = ready(features);
  const auto rho = mean_similarity(x, mask);
  const int64_t places = std::min(n - reserved, tokens);
  auto out = empty(x, {b, places}, ScalarType::Long);
  const Mask present(mask, tokens);
  with_features(x, [&](const auto* p) {
    for_each_image(b, [&](int64_t image) {
      const float* score = data<float>(scores) + image * tokens;
      const int64_t* label = data<int64_t>(group) + image * tokens;
      const auto kept = std::make_unique<bool[]>(tokens);
      // From 1 up the threshold suppresses nothing, even where rounding makes a similarity slightly larger than 1.
      const float tau = data<float>(rho)[image] * static_cast<float>(n) / 32.0f;
      Cosines cosine(p + image * tokens * x.size(2), tokens, x.size(2));
      nms(score, label, tau < 1.0f ? tau : INFINITY, present.tokens(image), cosine, kept.get());
      pick_by_quota(
          score, label, kept.get(), tokens, groups, n, reserved, [&](int64_t i) { return present(image, i); },
          data_out<int64_t>(out) + image * places);
    });
  });
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("prune_sid", LVTP_KERNEL("prune_sid", &lvtp::cpu::prune_sid_op)); }
