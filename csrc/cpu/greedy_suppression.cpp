#include <algorithm>
#include <vector>

#include "common.h"
#include "greedy.h"

namespace lvtp::cpu {

// ID-Selection's loop on a given similarity: scores [B, N], similarity [B, N, N] -> int64 [B, k] in pick order,
// -1 after the last real token.
static Tensor greedy_suppression_op(Tensor scores, Tensor similarity, int64_t k, double gamma, OptionalTensor mask) {
  checks::greedy_suppression(scores, similarity, k, gamma, mask);
  const auto s = ready(scores, ScalarType::Float);
  const auto sim = ready(similarity, ScalarType::Float);
  const int64_t b = s.size(0), n = s.size(1);
  const Mask present(mask, n);
  auto out = empty(s, {b, k}, ScalarType::Long);

  for_each_image(b, [&](int64_t image) {
    const auto tokens = present.tokens(image);
    std::vector<Suppression::State> states;
    for (const int32_t j : tokens) states.push_back({finite_score(data<float>(s)[image * n + j])});
    const float* rows = data<float>(sim) + image * n * n;
    int64_t* picks = data_out<int64_t>(out) + image * k;
    std::fill_n(picks, k, -1);
    Similarities source{[&](int64_t j, int64_t i) { return finite_similarity(rows[i * n + j]); }};
    greedy(suppression(gamma), tokens, states, k, source, [&](int64_t step, int64_t i) { picks[step] = i; });
  });
  return out;
}

}  // namespace lvtp::cpu

STABLE_TORCH_LIBRARY_IMPL(lvtp, CPU, m) {
  m.impl("greedy_suppression", LVTP_KERNEL("greedy_suppression", &lvtp::cpu::greedy_suppression_op));
}
