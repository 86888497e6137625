// Non-maximum suppression inside groups, for cluster_nms (a given matrix) and prune_sid (cosines as they are needed).
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "greedy.h"

namespace lvtp::cpu {

// One image: kept[i] becomes true for the tokens that stay. Groups never interact, so each is a loop of its own.
template <class Source>
void nms(
    const float* scores, const int64_t* labels, float tau, std::vector<int32_t> tokens, Source& source, bool* kept) {
  std::stable_sort(tokens.begin(), tokens.end(), [&](int32_t a, int32_t b) { return labels[a] < labels[b]; });
  for (auto begin = tokens.begin(); begin != tokens.end();) {
    const int64_t group = labels[*begin];
    const auto end = std::find_if(begin, tokens.end(), [&](int32_t i) { return labels[i] != group; });
    const std::vector<int32_t> members(begin, end);
    std::vector<GroupNms::State> states;
    for (const int32_t i : members) states.push_back({std::isnan(scores[i]) ? kOut : scores[i], group, false});
    greedy(GroupNms{tau}, members, states, static_cast<int64_t>(members.size()), source, [&](int64_t, int32_t i) {
      kept[i] = true;
    });
    begin = end;
  }
}

}  // namespace lvtp::cpu
