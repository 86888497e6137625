// The greedy rules. Every training-free selector here is one loop,
//
//     k times: i = argmax key(state); take i; for every other token j: update(state_j, state_i, sim_ij)
//
// and a rule states what differs: what a token's state is, which key ranks it, and what a pick does to the others.
// The loop itself (which similarities are computed, by whom, and when) belongs to an engine:
// csrc/cpu/greedy.h on the CPU, csrc/cuda/greedy.cuh on CUDA devices. A rule knows neither torch nor the device, so
// adding one here adds it everywhere.
//
// A rule has
//   State                       what it remembers of a token; trivially copyable
//   kNeverRises                 true if no update can raise a key, whichever others came before it. A state that has
//                               seen only some of the picks then has an upper bound of the true key, so an engine may
//                               leave states stale until they reach the top (lazy greedy, exact)
//   key(state)                  the rank of a token not yet taken: highest first, ties to the lowest index
//   pickable(key)               false: the loop ends here, because no token left is worth taking
//   matters(state_i)            false: taking i changes no other token, so no similarity to it is ever needed
//   touches(state_j, state_i)   false: taking i does not change j, whatever their similarity
//   update(state_j, state_i, r) what taking i does to j, r = sim_ij in [-1, 1]
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace lvtp {

// The key of a token that is taken or is padding; below that of any token still in the race.
constexpr float kOut = -INFINITY;

// Scores live within +-2^100 so that k <= 2^24 subtractions can never reach -inf, which marks tokens that are out;
// a NaN score goes below all others and stays finite: its token is picked after every other one.
LVTP_HD float finite_score(float s) {
  constexpr float kLimit = 0x1p100f, kAfterAllOthers = -0x1p126f;
  if (s != s) return kAfterAllOthers;
  return s < -kLimit ? -kLimit : s > kLimit ? kLimit : s;
}

// A similarity that is not a number says nothing: 0.
LVTP_HD float finite_similarity(float r) {
  if (r != r) return 0.0f;
  return r == INFINITY ? 1.0f : r == -INFINITY ? -1.0f : r;
}

// ID-Selection (arXiv 2604.05601): importance first, then diversity. A pick costs every other token
// exp(-gamma (1 - r)^2) of the pick's own score. max(S_i, 0) keeps scores from rising once they are exhausted.
struct Suppression {
  struct State {
    float score;
  };
  static constexpr bool kNeverRises = true;
  float gamma;  // finite: an infinite one would make NaN of a distance of 0

  LVTP_HD float key(const State& s) const { return s.score; }
  LVTP_HD bool pickable(float key) const { return key > kOut; }
  LVTP_HD bool matters(const State& picked) const { return picked.score > 0.0f; }
  LVTP_HD bool touches(const State&, const State&) const { return true; }
  LVTP_HD void update(State& s, const State& picked, float r) const {
    const float distance = fminf(fmaxf(0.0f, 1.0f - r), 0x1p60f);  // the upper bound only keeps the square finite
    s.score -= expf(-gamma * (distance * distance)) * fmaxf(picked.score, 0.0f);
  }
};

inline Suppression suppression(double gamma) {
  constexpr double kMost = 0x1.fffffep127;  // the largest float
  return {static_cast<float>(gamma < kMost ? gamma : kMost)};
}

// Non-maximum suppression inside groups (PruneSID, arXiv 2603.09480, step 4): the best token left is kept and drops
// every token of its own group that is more similar to it than tau. Groups never interact.
struct GroupNms {
  struct State {
    float score;
    int64_t group;
    bool dropped;
  };
  static constexpr bool kNeverRises = true;
  float tau;

  LVTP_HD float key(const State& s) const { return s.dropped ? kOut : s.score; }
  LVTP_HD bool pickable(float key) const { return key > 0.0f; }
  LVTP_HD bool matters(const State&) const { return tau < INFINITY; }
  LVTP_HD bool touches(const State& s, const State& picked) const { return s.group == picked.group; }
  LVTP_HD void update(State& s, const State& picked, float r) const {
    if (s.group == picked.group && r > tau) s.dropped = true;
  }
};

}  // namespace lvtp
