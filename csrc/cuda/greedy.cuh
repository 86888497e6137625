// The greedy engine of CUDA: the loop of csrc/rules.h, eager, run by a team of threads (a block, or a warp).
#pragma once

#include <cstdint>
#include <cstring>

#include "../rules.h"
#include "device.cuh"

namespace lvtp::cuda {
namespace {

// A token's place in the race as one number: higher key first, equal keys by lower index. 0 is nobody.
using Rank = unsigned long long;  // the 64-bit type that atomicMax takes

__device__ inline Rank ranked(float key, int index) {
  const uint32_t bits = __float_as_uint(key + 0.0f);  // -0 + 0 is +0: equal keys become equal bits
  const uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<Rank>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}
__device__ inline int index_of(Rank rank) { return static_cast<int>(0xffffffffu - static_cast<uint32_t>(rank)); }
__device__ inline float key_of(Rank rank) {
  const auto ordered = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

// The highest rank in a warp, in every lane: two reductions in hardware instead of ten shuffles.
__device__ inline Rank warp_max(Rank rank) {
  const auto high = static_cast<uint32_t>(rank >> 32);
  const uint32_t highest = __reduce_max_sync(kFullWarp, high);
  const uint32_t low = __reduce_max_sync(kFullWarp, high == highest ? static_cast<uint32_t>(rank) : 0u);
  return static_cast<Rank>(highest) << 32 | low;
}

template <class State>
struct Candidate {
  Rank rank = 0;
  State state{};
};

// A block as a team: all of it takes part, in whole warps. One barrier an argmax.
template <class State>
struct BlockTeam {
  struct Shared {  // two halves, used in turn: a slow warp may read one while a fast one writes the other
    Rank rank[2][32];
    State state[2][32];
  };
  Shared& shared;
  int turn = 0;

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int size() const { return static_cast<int>(blockDim.x); }
  __device__ Candidate<State> best(const Candidate<State>& mine) {
    const int warp = thread() / 32, lane = thread() % 32;
    const Rank in_warp = warp_max(mine.rank);
    if (in_warp == 0 ? lane == 0 : mine.rank == in_warp) {
      shared.rank[turn][warp] = in_warp;
      shared.state[turn][warp] = mine.state;
    }
    __syncthreads();  // every warp has entered its best
    const Rank theirs = lane < size() / 32 ? shared.rank[turn][lane] : 0;
    const Rank highest = warp_max(theirs);
    const int winner = __ffs(__ballot_sync(kFullWarp, theirs == highest)) - 1;
    const Candidate<State> all{highest, shared.state[turn][winner]};
    turn ^= 1;
    return all;
  }
};

// A warp as a team. The states of its candidates go from lane to lane word by word.
template <class State>
struct WarpTeam {
  static_assert(sizeof(State) % 4 == 0);

  __device__ int thread() const { return static_cast<int>(threadIdx.x % 32); }
  __device__ int size() const { return 32; }
  __device__ Candidate<State> best(const Candidate<State>& mine) {
    Candidate<State> all{warp_max(mine.rank), {}};
    const int winner = __ffs(__ballot_sync(kFullWarp, mine.rank == all.rank)) - 1;
    uint32_t words[sizeof(State) / 4];
    memcpy(words, &mine.state, sizeof(State));
#pragma unroll
    for (uint32_t& word : words) word = __shfl_sync(kFullWarp, word, winner);
    memcpy(&all.state, words, sizeof(State));
    return all;
  }
};

// A token whose state is not in registers.
template <class Rule>
struct Slot {
  typename Rule::State state;
  bool out;
};

// Tokens 0..n-1 of one image, dealt to the team's threads in turn: the first kRegisters of each thread live in its
// registers, any others in `slots`, workspace that the threads never share.
//   load(j, state)      the token's state; false where it takes no part
//   similarity(j, i)    asked once for each pair whose update needs it
//   take(step, i, state)  called by one thread; the state that i has then
// The loop also ends where no token ranks above `beyond`.
// kAhead: rows are read as soon as a pick is known, before it is known whether it matters; the pick's state arrives
// meanwhile. For rules whose picks nearly all do.
// Returns, in every thread, how many were taken: k, or fewer where the rule ends the loop or the tokens do.
template <int kRegisters, bool kAhead, class Rule, class Team, class Load, class Similarity, class Take>
__device__ int64_t greedy(
    const Rule& rule, Team team, int n, int64_t k, Slot<Rule>* slots, const Load& load, const Similarity& similarity,
    const Take& take, Rank beyond = 0) {
  using State = typename Rule::State;
  const int in_registers = kRegisters * team.size(), first_slot = in_registers + team.thread();
  State state[kRegisters]{};
  uint32_t out = 0;  // one bit a state in registers: taken, or never there
#pragma unroll
  for (int p = 0; p < kRegisters; ++p) {
    const int j = team.thread() + p * team.size();
    if (j >= n || !load(j, state[p])) out |= 1u << p;
  }
  for (int j = first_slot; j < n; j += team.size()) {
    Slot<Rule>& slot = slots[j - in_registers];
    slot.out = !load(j, slot.state);
  }

  for (int64_t step = 0; step < k; ++step) {
    Candidate<State> mine;
    const auto consider = [&](const State& s, int j) {
      const Rank rank = ranked(rule.key(s), j);
      if (rank > mine.rank) mine = {rank, s};
    };
#pragma unroll
    for (int p = 0; p < kRegisters; ++p) {
      if (!(out >> p & 1)) consider(state[p], team.thread() + p * team.size());
    }
    for (int j = first_slot; j < n; j += team.size()) {
      if (!slots[j - in_registers].out) consider(slots[j - in_registers].state, j);
    }

    const Candidate<State> pick = team.best(mine);
    if (pick.rank <= beyond || !rule.pickable(key_of(pick.rank))) return step;
    const int i = index_of(pick.rank);
    if (team.thread() == 0) take(step, i, pick.state);

    const bool matters = rule.matters(pick.state) && step + 1 < k;
    const auto changes = [&](const State& s) { return matters && rule.touches(s, pick.state); };
    // First all reads, then all updates, none behind a branch: the tokens' ways to memory and back overlap.
    constexpr int kAtOnce = kRegisters < 4 ? kRegisters : 4;
#pragma unroll
    for (int first = 0; first < kRegisters; first += kAtOnce) {
      float row[kAtOnce] = {};
#pragma unroll
      for (int p = first; p < first + kAtOnce; ++p) {
        const int j = team.thread() + p * team.size();
        if (j == i) out |= 1u << p;
        if (!(out >> p & 1) && (kAhead || changes(state[p]))) row[p - first] = similarity(j, i);
      }
#pragma unroll
      for (int p = first; p < first + kAtOnce; ++p) {
        State changed = state[p];
        rule.update(changed, pick.state, row[p - first]);
        state[p] = !(out >> p & 1) && changes(state[p]) ? changed : state[p];
      }
    }
    for (int j = first_slot; j < n; j += team.size()) {
      Slot<Rule>& slot = slots[j - in_registers];
      if (j == i) slot.out = true;
      if (!slot.out && changes(slot.state)) rule.update(slot.state, pick.state, similarity(j, i));
    }
  }
  return k;
}

}  // namespace
}  // namespace lvtp::cuda
