// The greedy engine of the CPU: the loop of csrc/rules.h, eager (every state is brought up to date at every pick).
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../rules.h"

namespace lvtp::cpu {

inline Suppression suppression(double gamma) {
  return {static_cast<float>(std::min(gamma, static_cast<double>(std::numeric_limits<float>::max())))};
}

// One image. `states` holds n tokens, `present(j)` is false for padding, `similarity_row(i)` points at sim_i0 ..
// sim_in-1 and `take(step, i)` receives the picks in order. Returns how many there were: k, or fewer where the rule
// ends the loop or the tokens do.
template <class Rule, class Present, class Row, class Take>
int64_t greedy(
    const Rule& rule, std::vector<typename Rule::State>& states, int64_t k, const Present& present,
    const Row& similarity_row, const Take& take) {
  const auto n = static_cast<int64_t>(states.size());
  std::vector<float> keys(n);
  for (int64_t j = 0; j < n; ++j) keys[j] = present(j) ? rule.key(states[j]) : kOut;

  for (int64_t step = 0; step < k; ++step) {
    int64_t best = 0;
    for (int64_t j = 1; j < n; ++j) {
      if (keys[j] > keys[best]) best = j;  // strict: ties stay with the lowest index
    }
    if (!rule.pickable(keys[best])) return step;
    take(step, best);
    keys[best] = kOut;
    if (step + 1 == k) break;

    const float* row = similarity_row(best);
    for (int64_t j = 0; j < n; ++j) {
      if (keys[j] == kOut) continue;
      rule.update(states[j], states[best], row[j]);
      keys[j] = rule.key(states[j]);
    }
  }
  return k;
}

}  // namespace lvtp::cpu
