// Step 5 of PruneSID (arXiv 2603.09480; ALGORITHMS: "Quotas"): how many tokens each group may keep.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace lvtp {

// In: per group its size and how many NMS kept, the budget n with its reserved part, and the number of tokens the
// quotas must add up to, target = min(n - reserved, real tokens). Out: quota. `up` is scratch, also [groups].
LVTP_HD void quotas(
    const int32_t* size, const int32_t* kept, int32_t groups, int64_t n, int64_t reserved, int64_t target, int32_t* up,
    int32_t* quota) {
  // Bounds. One token at least from every group that has any; at most what NMS kept and 5 ceil(n / 64), raised by one
  // in every group at once until the budget fits.
  const int64_t cap = 5 * ((n + 63) / 64);
  int64_t sum_low = 0, sum_up = 0, sum_kept = 0, most_kept = 0;
  for (int32_t g = 0; g < groups; ++g) {
    const int64_t most = size[g] < kept[g] ? size[g] : kept[g];
    up[g] = static_cast<int32_t>(most < cap ? most : cap);
    sum_up += up[g];
    sum_low += size[g] > 0;
    sum_kept += kept[g];
    most_kept = kept[g] > most_kept ? kept[g] : most_kept;
  }
  for (bool grew = true; sum_up < n && grew;) {
    grew = false;
    for (int32_t g = 0; g < groups; ++g) {
      if (up[g] >= size[g]) continue;
      ++up[g];
      ++sum_up;
      grew = true;
    }
  }

  // Shares of what is left after one a group, in proportion to what NMS kept. The running sum is kept in double and
  // rounded to fp32 at every group, as torch.cumsum does; rintf rounds half to even.
  const int64_t rest = n - sum_low - reserved > 0 ? n - sum_low - reserved : 0;
  double running = 0.0;
  int64_t before = 0, total = 0;
  for (int32_t g = 0; g < groups; ++g) {
    if (sum_kept > 0) running += static_cast<float>(kept[g]) / static_cast<float>(sum_kept);
    const auto after = static_cast<int64_t>(rintf(static_cast<float>(running) * static_cast<float>(rest)));
    const int64_t share = (size[g] > 0) + after - before;
    quota[g] = static_cast<int32_t>(share < up[g] ? share : up[g]);
    before = after;
    total += quota[g];
  }

  // What is missing, group by group, the one with most kept first (ties: lowest g), each to its upper bound.
  for (int64_t level = most_kept; total < target && level >= 0; --level) {
    for (int32_t g = 0; g < groups && total < target; ++g) {
      if (kept[g] != level) continue;
      const int64_t room = up[g] - quota[g], missing = target - total;
      const auto add = static_cast<int32_t>(room < missing ? room : missing);
      quota[g] += add;
      total += add;
    }
  }
  // Where one token a group is already too many (most of n is reserved), the reverse order gives some back.
  for (int64_t level = 0; total > target && level <= most_kept; ++level) {
    for (int32_t g = groups - 1; g >= 0 && total > target; --g) {
      if (kept[g] != level) continue;
      const int64_t excess = total - target;
      const auto cut = static_cast<int32_t>(quota[g] < excess ? quota[g] : excess);
      quota[g] -= cut;
      total -= cut;
    }
  }
}

}  // namespace lvtp
