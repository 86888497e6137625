#include <algorithm>
#include <vector>

#include "common.h"
#include "greedy.h"

namespace lvtp::cpu {

// Step 1 of ID-Selection: importance to [0, 1] over its finite values; as it is where they are all alike or their
// difference overflows. +Inf becomes 2 and -Inf 0; a NaN stays one, for finite_score to put last.
template <class Present>
static void min_max_scale(const float* importance, int64_t n, const Present& present, float* out) {
  float low = INFINITY, high = -INFINITY;
  for (int64_t j = 0; j < n; ++j) {
    if (!present(j) || !std::isfinite(importance[j])) continue;
    low = std::min(low, importance[j]);
    high = std::max(high, importance[j]);
  }
  const float spread = high - low;  // -inf where nothing is finite
  const bool scale = spread > 1e-9f && spread < INFINITY;
  for (int64_t j = 0; j < n; ++j) {
    const float s = importance[j];
    out[j] = std::isinf(s) ? (s > 0 ? 2.0f : 0.0f) : scale ? (s - low) / spread : s;
  }
}

// Sixteen partial sums, so that the compiler may vectorise without being allowed to reorder anything else.
static float dot(const float* a, const float* b, int64_t d) {
  constexpr int64_t kLanes = 16;
  float partial[kLanes] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) partial[lane] += a[c + lane] * b[c + lane];
  }
  float sum = 0.0f;
  for (; c < d; ++c) sum += a[c] * b[c];
  for (const float p : partial) sum += p;
  return sum;
}

// features [B, N, D], importance [B, N] -> int64 [B, k] in pick order, -1 after the last real token.
// A pick needs one row of the similarity, so k rows are computed and no N x N matrix exists.
static Tensor id_selection_op(Tensor features, Tensor importance, int64_t k, double gamma, OptionalTensor mask) {
  checks::id_selection(features, importance, k, gamma, mask);
  const auto unit = unit_features(features);
  const auto s = ready(importance, ScalarType::Float);
  const int64_t b = unit.size(0), n = unit.size(1), d = unit.size(2);
  const Mask mask_of(mask, n);
  auto out = empty_like_device(unit, {b, k}, ScalarType::Long);

  for_each_image(b, [&](int64_t image) {
    const auto present = [&](int64_t j) { return mask_of(image, j); };
    std::vector<float> scores(n), row(n);
    min_max_scale(data<float>(s) + image * n, n, present, scores.data());
    std::vector<Suppression::State> states(n);
    for (int64_t j = 0; j < n; ++j) states[j] = {finite_score(scores[j])};

    const float* x = data<float>(unit) + image * n * d;
    const auto similarity_row = [&](int64_t i) {
      for (int64_t j = 0; j < n; ++j) row[j] = dot(x + i * d, x + j * d, d);
      return row.data();
    };
    int64_t* picks = data_out<int64_t>(out) + image * k;
    std::fill_n(picks, k, -1);
    greedy(suppression(gamma), states, k, present, similarity_row, [&](int64_t step, int64_t i) { picks[step] = i; });
  });
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) { m.impl("id_selection", TORCH_BOX(&lvtp::cpu::id_selection_op)); }
