// The greedy engine of the CPU: the loop of csrc/rules.h, lazy.
#pragma once

#include <algorithm>
#include <vector>

#include "../rules.h"

namespace lvtp::cpu {

// `tokens`, ascending, are those of one image that take part, `states` their initial states in the same order.
// `similarity(j, i)` of two tokens is asked for only when it can matter, and `take(step, i)` receives the picks.
// Returns how many there were: k, or fewer where the rule ends the loop or the tokens do.
//
// No rule here lets a key rise, so a key that has not seen the latest picks is an upper bound on the true one. Tokens
// wait in a heap of such bounds; only the one on top is brought up to date, pick by pick, and it falls back as soon as
// another bound is higher. A token on top that has seen every pick is the true argmax, so the picks are exactly those
// of the eager loop, update for update, for a small part of its similarities.
template <class Rule, class Similarity, class Take>
int64_t greedy(
    const Rule& rule, const std::vector<int32_t>& tokens, std::vector<typename Rule::State> states, int64_t k,
    Similarity&& similarity, const Take& take) {
  static_assert(Rule::kNeverRises, "a stale key must bound the true one");
  struct Bound {
    float key;
    int32_t at;                                 // position in `tokens`
    bool operator<(const Bound& other) const {  // below the other in the heap: lower key, ties the higher index
      return key < other.key || (key == other.key && at > other.at);
    }
  };
  std::vector<Bound> heap(tokens.size());
  for (size_t j = 0; j < tokens.size(); ++j) heap[j] = {rule.key(states[j]), static_cast<int32_t>(j)};
  std::make_heap(heap.begin(), heap.end());

  std::vector<int32_t> picked;                  // the picks that change others
  std::vector<int32_t> seen(tokens.size(), 0);  // how many of them a token's state knows of
  int64_t step = 0;
  while (step < k && !heap.empty()) {
    Bound bound = heap.front();
    if (!rule.pickable(bound.key)) break;  // an upper bound on every key left
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();

    const int32_t j = bound.at;
    const auto on_top = [&] { return heap.empty() || heap.front() < bound; };
    while (seen[j] < static_cast<int32_t>(picked.size()) && on_top()) {
      const int32_t i = picked[seen[j]++];
      if (!rule.touches(states[j], states[i])) continue;
      rule.update(states[j], states[i], similarity(tokens[j], tokens[i]));
      bound.key = rule.key(states[j]);
    }
    if (!rule.pickable(bound.key)) continue;  // out of the race for good
    if (on_top()) {
      take(step++, tokens[j]);
      if (rule.matters(states[j])) picked.push_back(j);
    } else {
      heap.push_back(bound);
      std::push_heap(heap.begin(), heap.end());
    }
  }
  return step;
}

}  // namespace lvtp::cpu
