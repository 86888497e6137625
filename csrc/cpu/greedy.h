// The greedy engine of the CPU: the loop of csrc/rules.h, lazy.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../rules.h"

namespace lvtp::cpu {

inline Suppression suppression(double gamma) {
  return {static_cast<float>(std::min(gamma, static_cast<double>(std::numeric_limits<float>::max())))};
}

// One image of n tokens. `states[j]` is the initial state of token j, `tokens` lists those that take part (no padding),
// `similarity(j, i)` is asked for only when it can matter and `take(step, i)` receives the picks in order. Returns how
// many there were: k, or fewer where the rule ends the loop or the tokens do.
//
// No rule here lets a key rise, so a key that has not seen the latest picks is an upper bound on the true one. Tokens
// wait in a heap of such bounds; only the one on top is brought up to date, pick by pick, and it falls back as soon as
// another bound is higher. A token on top that has seen every pick is the true argmax, so the picks are exactly those
// of the eager loop, update for update, for a small part of its similarities.
template <class Rule, class Similarity, class Take>
int64_t greedy(
    const Rule& rule, std::vector<typename Rule::State>& states, const std::vector<int32_t>& tokens, int64_t k,
    Similarity&& similarity, const Take& take) {
  static_assert(Rule::kNeverRises, "a stale key must bound the true one");
  struct Bound {
    float key;
    int32_t token;
    bool operator<(const Bound& other) const {  // below the other in the heap: lower key, ties the higher index
      return key < other.key || (key == other.key && token > other.token);
    }
  };
  std::vector<Bound> heap;
  heap.reserve(tokens.size());
  for (const int32_t j : tokens) heap.push_back({rule.key(states[j]), j});
  std::make_heap(heap.begin(), heap.end());

  std::vector<int32_t> seen(states.size(), 0);  // how many of `picked` a token's state knows of
  std::vector<int32_t> picked;                  // the picks that change others
  int64_t step = 0;
  while (step < k && !heap.empty()) {
    const int32_t j = heap.front().token;
    if (!rule.pickable(heap.front().key)) break;  // an upper bound on every key left

    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    Bound bound{rule.key(states[j]), j};
    const auto still_on_top = [&] { return heap.empty() || heap.front() < bound; };
    while (seen[j] < static_cast<int32_t>(picked.size()) && still_on_top()) {
      const int32_t i = picked[seen[j]++];
      if (!rule.touches(states[j], states[i])) continue;
      rule.update(states[j], states[i], similarity(j, i));
      bound.key = rule.key(states[j]);
    }
    if (still_on_top() && rule.pickable(bound.key)) {
      take(step++, j);
      if (rule.matters(states[j])) picked.push_back(j);
    } else if (rule.pickable(bound.key)) {
      heap.push_back(bound);
      std::push_heap(heap.begin(), heap.end());
    }
  }
  return step;
}

}  // namespace lvtp::cpu
