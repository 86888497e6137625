// ID-Selection without the similarity matrix: one launch, of blocks that wait for each other.
//
// A team of blocks has an image, and each of its blocks every so-manieth token. In a round the team agrees on the
// kCandidates tokens of the highest scores and computes the cosines of all tokens with them, on tensor cores: the
// features are read once a round. Then every block takes, by itself and all alike, the picks that need nothing else:
// the best candidate, as long as it ranks above the last known score of every other token, which can only have fallen
// (kNeverRises). Each block brings its tokens up to date with these picks, in their order, the team agrees on the best
// token that is not a candidate, and so on, until that one is the best of all: a new round begins. Picks and scores are
// those of the loop over a matrix, whatever the number of blocks.
//
// In a simulation, 16384 tokens and 1024 picks take 9 to 15 rounds, in which the team waits 27 to 51 times, where 12 to
// 1000 clusters of tokens lie anywhere, and 15 to 35, with 46 to 114 waits, where neighbours are alike. With 64
// candidates there are 1.4 to 2 times as many rounds, each of two thirds of the bytes: a block reads its tokens and the
// candidates.
#include "rounds.cuh"

#include "importance.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = kPublished / 4;  // of a team
constexpr int kMostTeams = 16;               // more images are taken in turn, in the same workspace

// The scores that the picks begin with, kOut for padding. A block an image.
__global__ void __launch_bounds__(kThreads) scale_importance(
    const float* __restrict__ importance, const bool* __restrict__ mask, int n, float* __restrict__ scores) {
  const int64_t image = blockIdx.x;
  importance += image * n;
  scores += image * n;
  const auto real = [&](int j) { return mask == nullptr || mask[image * n + j]; };
  const Scaling scaling = scaling_of(importance, n, real);
  for (int j = threadIdx.x; j < n; j += kThreads) scores[j] = real(j) ? finite_score(scaling.of(importance[j])) : kOut;
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, TilePlan::kBlocks)
    suppress_in_rounds(const T* x, Shape shape, Suppression rule, Scratch scratch, int64_t* picks) {
  int round = 0, turn = 0;
  const bool speaker = blockIdx.x % shape.blocks == 0;
  for (int64_t image = blockIdx.x / shape.blocks; image < shape.images; image += shape.teams) {
    Race<T> race(x, shape, rule, scratch, image);
    unsigned* const arrivals = &race.team.signals->arrivals;
    Rank* const best = race.team.signals->best;
    int64_t* const out = picks + image * int64_t{shape.k};
    int step = 0;
    while (step < shape.k) {
      race.propose(++round);
      team_barrier(arrivals, shape.blocks);  // the proposals are there
      if (!race.choose(round)) break;
      race.multiply();
      int taken = 0;
      do {
        if (speaker && threadIdx.x == 0) best[(turn + 1) % 3] = 0;
        race.follow(taken, best[turn % 3]);
        team_barrier(arrivals, shape.blocks);  // every block has entered its best token
        if (threadIdx.x < 32) {
          race.pick(shape.k - step, best[turn % 3], [&](int s, int token) {
            if (speaker) out[step + s] = token;
          });
        }
        __syncthreads();  // the picks are known
        taken = race.shared.taken;
        step += taken;
        ++turn;
      } while (taken > 0 && step < shape.k);
    }
    for (step += threadIdx.x; speaker && step < shape.k; step += kTileThreads) out[step] = -1;
  }
}

// The workspace in pieces.
Scratch scratch_of(Workspace& workspace, int64_t images, int64_t n) {
  const int64_t teams = images < kMostTeams ? images : kMostTeams;
  Scratch s{};
  s.room = n + ceil_div(n, kTile);
  s.signals = workspace.take<Signals>(kMostTeams);
  s.scores = workspace.take<float>(images * n);
  s.cosines = workspace.take<float>(teams * kCandidates * s.room);
  s.between = workspace.take<float>(teams * kCandidates * kCandidates);
  s.published = workspace.take<Rank>(teams * 2 * kPublished);
  return s;
}

template <class T>
cudaError_t launch_rounds(
    const T* x, Shape shape, const Suppression& rule, const Scratch& scratch, int64_t* picks, cudaStream_t stream) {
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  int64_t together = 0;
  LVTP_TRY(blocks_at_a_time(suppress_in_rounds<T>, kTileThreads, kShared, together));
  if (together == 0) return cudaErrorInvalidConfiguration;
  const int64_t turns = ceil_div(shape.images, least(kMostTeams, together));
  const int64_t teams = ceil_div(shape.images, turns);
  shape.teams = static_cast<int>(teams);
  shape.blocks = static_cast<int>(least(least(together / teams, kMostBlocks), ceil_div(shape.n, kTile)));
  shape.width = copy_width(x, shape.d);
  return launch_together(
      suppress_in_rounds<T>, shape.teams * shape.blocks, kTileThreads, kShared, stream, x, shape, rule, scratch, picks);
}

}  // namespace

int64_t id_selection_in_rounds_workspace(int64_t images, int64_t n) {
  Workspace count{nullptr};
  scratch_of(count, images, n);
  return count.used;
}

cudaError_t id_selection_in_rounds(
    const void* features, Dtype dtype, const float* importance, const bool* mask, int64_t images, int64_t n, int64_t d,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream) {
  Workspace pieces{static_cast<char*>(workspace)};
  const Scratch scratch = scratch_of(pieces, images, n);
  const auto size = static_cast<int>(n);
  LVTP_TRY(cudaMemsetAsync(scratch.signals, 0, kMostTeams * sizeof(Signals), stream));
  LVTP_TRY(launch(scale_importance, blocks(images), kThreads, 0, stream, importance, mask, size, scratch.scores));
  return with_dtype(features, dtype, [&](const auto* x) {
    return launch_rounds(
        x, Shape{images, d, size, static_cast<int>(k), 0, 0, 0}, suppression(gamma), scratch, picks, stream);
  });
}

}  // namespace lvtp::cuda
