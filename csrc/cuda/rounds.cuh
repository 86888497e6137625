// A block's part in ID-Selection without the similarity matrix; rounds.cu says how it goes.
#pragma once

#include "greedy.cuh"
#include "tile.cuh"

namespace lvtp::cuda {
namespace {

using State = Suppression::State;

constexpr int kTile = 64, kCandidates = 128;  // tokens of a block that are multiplied at a time, by the candidates
constexpr int kPublished = 2048;              // tokens that the candidates of a round are chosen from
constexpr int kWarps = kTileThreads / 32;
static_assert(kTileThreads == kCandidates, "a thread a candidate");
using TilePlan = Plan<kTile, kCandidates>;

// By which a team's blocks meet: zero when they begin.
struct Signals {
  unsigned arrivals;
  Rank best[3];  // in turn: of the tokens that are not candidates
};

// What a team shares, in global memory.
struct Scratch {
  float* scores;     // [images, n]; kOut: taken, or padding
  float* cosines;    // [teams, kCandidates, room]; a block reads what it wrote itself
  float* between;    // [teams, kCandidates, kCandidates]: candidates with candidates, by the second
  Rank* published;   // [teams, 2, kPublished], in turn
  Signals* signals;  // [teams]
  int64_t room;      // for the tokens of a team's blocks, each with as many as the first
};

struct Shape {
  int64_t images, d;
  int n, k, teams, blocks, width;  // blocks of a team
};

// A block's, beside the stages of a tile.
struct Shared {
  Lengths<kTile, kCandidates> lengths;
  Rank chosen[kCandidates];  // the candidates as they come
  int token[kCandidates];    // and in ascending order, the order of their slots
  float score[kCandidates];
  int pick[kCandidates];  // slots of the picks that are not everywhere accounted for, and their scores when taken
  State picked[kCandidates];
  int counts[2][kWarps], count, taken;
};
constexpr int kShared = TilePlan::kShared + sizeof(Shared);

// The least rank that `wanted` of the block's are not below, or 0 where they are fewer. `own` tells how many of the
// thread's are not below a rank.
template <class Own>
__device__ Rank least_of_highest(int wanted, const Own& own, int (&counts)[2][kWarps]) {
  Rank least = 0;
  int turn = 0;
  for (Rank bit = Rank{1} << 63; bit != 0; bit >>= 1, turn ^= 1) {
    const int in_warp = __reduce_add_sync(kFullWarp, own(least | bit));
    if (threadIdx.x % 32 == 0) counts[turn][threadIdx.x / 32] = in_warp;
    __syncthreads();  // every warp has entered its count
    int all = 0;
    for (const int count : counts[turn]) all += count;
    if (all >= wanted) least |= bit;
    if (all == wanted) break;
  }
  return least;
}

// A block's part of one image.
template <class T>
struct Race {
  const T* x;
  int64_t d;
  int n, blocks, block, width;
  Suppression rule;
  Scratch team;  // all of it the team's, and the image's scores
  char* stages;
  Shared& shared;

  __device__ Race(const T* features, const Shape& s, const Suppression& rule, const Scratch& all, int64_t image)
      : x(features + image * s.n * s.d),
        d(s.d),
        n(s.n),
        blocks(s.blocks),
        block(blockIdx.x % s.blocks),
        width(s.width),
        rule(rule),
        team(all),
        stages(dynamic_shared()),
        shared(*reinterpret_cast<Shared*>(stages + TilePlan::kShared)) {
    const int64_t t = blockIdx.x / s.blocks;
    team.scores += image * n;
    team.cosines += t * kCandidates * all.room + block * int64_t{(n + blocks - 1) / blocks};
    team.between += t * kCandidates * kCandidates;
    team.published += t * 2 * kPublished;
    team.signals += t;
  }

  __device__ int own_tokens() const { return (n - block + blocks - 1) / blocks; }
  __device__ int token_of(int own) const { return block + own * blocks; }
  __device__ Rank rank_of(int token, const State& s) const { return s.score == kOut ? 0 : ranked(rule.key(s), token); }
  __device__ Rank rank_of(int token) const { return rank_of(token, {team.scores[token]}); }

  // The cosine of two candidates. A thread asks for the same first ones all along, so that most are found in its L1.
  __device__ float between(int slot, int other) const { return team.between[slot * kCandidates + other]; }

  // How many candidates' indices are below a token's.
  __device__ int slots_below(int token) const {
    int low = 0, high = shared.count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (shared.token[middle] < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }
  __device__ int slot_of(int token) const {  // -1: not a candidate
    const int slot = slots_below(token);
    return slot < shared.count && shared.token[slot] == token ? slot : -1;
  }

  // The block's best tokens, as many as it may propose.
  __device__ int proposals() const { return kPublished / blocks < kCandidates ? kPublished / blocks : kCandidates; }
  __device__ void propose(int round) {
    const int most = proposals(), count = own_tokens();
    Rank* const mine = team.published + round % 2 * kPublished + block * most;
    for (int p = threadIdx.x; p < most; p += kTileThreads) mine[p] = 0;
    if (threadIdx.x == 0) shared.count = 0;
    const auto own = [&](Rank least) {
      int above = 0;
      for (int r = threadIdx.x; r < count; r += kTileThreads) above += rank_of(token_of(r)) >= least;
      return above;
    };
    const Rank least = least_of_highest(most, own, shared.counts);
    for (int r = threadIdx.x; r < count; r += kTileThreads) {
      const Rank rank = rank_of(token_of(r));
      if (rank != 0 && rank >= least) mine[atomicAdd(&shared.count, 1)] = rank;
    }
  }

  // The best of all that were proposed; false where there are none.
  __device__ bool choose(int round) {
    constexpr int kHeld = kPublished / kTileThreads;
    const Rank* const published = team.published + round % 2 * kPublished;
    Rank held[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int at = h * kTileThreads + threadIdx.x;
      held[h] = at < blocks * proposals() ? published[at] : 0;
    }
    if (threadIdx.x == 0) shared.count = 0;
    const auto own = [&](Rank least) {
      int above = 0;
#pragma unroll
      for (const Rank rank : held) above += rank >= least;
      return above;
    };
    const Rank least = least_of_highest(kCandidates, own, shared.counts);
#pragma unroll
    for (const Rank rank : held) {
      if (rank != 0 && rank >= least) shared.chosen[atomicAdd(&shared.count, 1)] = rank;
    }
    shared.token[threadIdx.x] = 0;  // of slots that stay empty
    __syncthreads();                // all are chosen
    const int count = shared.count;
    if (threadIdx.x < count) {
      const Rank mine = shared.chosen[threadIdx.x];
      int slot = 0;
      for (int c = 0; c < count; ++c) slot += index_of(shared.chosen[c]) < index_of(mine);
      shared.token[slot] = index_of(mine);
      shared.score[slot] = key_of(mine);
    }
    __syncthreads();  // all are in order
    return count > 0;
  }

  // The cosines of the block's tokens with the candidates.
  __device__ void multiply() {
    const int64_t row_bytes = d * static_cast<int64_t>(sizeof(T));
    const auto features_of = [&](int token) { return x + token * d; };
    auto* const dot = reinterpret_cast<float (*)[kCandidates + 1]>(stages);
    const int own = own_tokens(), count = shared.count, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int first = 0; first < own; first += kTile) {
      const int rows = own - first < kTile ? own - first : kTile;
      const auto* const begin = reinterpret_cast<const char*>(x);
      const Strided row{begin + token_of(first) * row_bytes, blocks * row_bytes};
      const Gathered column{begin, row_bytes, shared.token};
      const auto quarter =
          multiply_tile<T, kTile, kCandidates>(row_bytes, stages, TilePlan::kColumnsAt, [&](int64_t at, char* to) {
            load_rows<kTile>(row, rows, row_bytes, at, width, to);
            load_rows<kCandidates>(column, count, row_bytes, at, width, to + TilePlan::kColumnsAt);
          });
      const auto features = [&](int r) -> const T* {  // null where nobody will ask
        if (r >= kTile) return r - kTile < count ? features_of(shared.token[r - kTile]) : nullptr;
        const bool asked = r < rows && team.scores[token_of(first + r)] != kOut;
        return asked ? features_of(token_of(first + r)) : nullptr;
      };
      finish(quarter, features, d, shared.lengths, dot);
      const auto cosine = [&](int r, int c) { return shared.lengths.cosine(dot[r][c], r, c, features, d); };
      for (int c = warp; c < count; c += kWarps) {
        for (int r = lane; r < rows; r += 32) team.cosines[c * team.room + first + r] = cosine(r, c);
      }
      for (int r = warp; r < rows; r += kWarps) {
        const int slot = slot_of(token_of(first + r));
        for (int c = lane; c < count && slot >= 0; c += 32) team.between[slot * kCandidates + c] = cosine(r, c);
      }
      __syncthreads();  // the tile is written, and gives way to the next one's stages
    }
  }

  // A token's state after the picks that it has not seen yet.
  template <class Similarity>
  __device__ State after_picks(State s, int token, int taken, const Similarity& similarity) const {
#pragma unroll 4
    for (int p = 0; p < taken; ++p) {
      const int slot = shared.pick[p];
      const float r = similarity(slot);
      if (rule.matters(shared.picked[p])) rule.update(s, shared.picked[p], r);
      if (token == shared.token[slot]) s.score = kOut;  // and stays there
    }
    return s;
  }

  // The tokens' and the candidates' scores after the last picks, and the best token of those that are not candidates.
  __device__ void follow(int taken, Rank& best) {
    Rank highest = 0;
    for (int r = threadIdx.x; r < own_tokens(); r += kTileThreads) {
      const int token = token_of(r);
      const float* const row = team.cosines + r;
      State s{team.scores[token]};
      if (s.score == kOut) continue;
      s = after_picks(s, token, taken, [&](int slot) { return row[slot * team.room]; });
      team.scores[token] = s.score;
      const Rank rank = rank_of(token, s);
      if (rank > highest && slot_of(token) < 0) highest = rank;
    }
    highest = warp_max(highest);
    if (threadIdx.x % 32 == 0) atomicMax(&best, highest);
    if (const int slot = threadIdx.x; slot < shared.count) {
      const State s{shared.score[slot]};
      const auto similarity = [&](int other) { return between(slot, other); };
      if (s.score != kOut) shared.score[slot] = after_picks(s, shared.token[slot], taken, similarity).score;
    }
  }

  // By one warp: candidates as long as they rank above `best` of all others. take(step, token).
  template <class Take>
  __device__ void pick(int most, Rank best, const Take& take) {
    const Rank beyond = best == 0 ? 0 : ranked(key_of(best), slots_below(index_of(best)));
    const int64_t taken = greedy<kCandidates / 32, true>(
        rule, WarpTeam<State>{}, shared.count, most, static_cast<Slot<Suppression>*>(nullptr),
        [&](int slot, State& s) {
          s.score = shared.score[slot];
          return s.score != kOut;
        },
        [&](int slot, int other) { return between(slot, other); },
        [&](int64_t step, int slot, const State& s) {
          shared.pick[step] = slot;
          shared.picked[step] = s;
          take(static_cast<int>(step), shared.token[slot]);
        },
        beyond);
    if (threadIdx.x == 0) shared.taken = static_cast<int>(taken);
  }
};

}  // namespace
}  // namespace lvtp::cuda
