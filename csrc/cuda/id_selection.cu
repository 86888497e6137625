// Two ways, by shape. Up to kGramTokens tokens: the similarity matrix, then one block's loop over its rows. Beyond,
// where the matrix outgrows the caches and then the memory: no matrix; every pick's row is computed by the whole
// device, one launch a pick.
#include "greedy.cuh"

namespace lvtp::cuda {
namespace {

using State = Suppression::State;

constexpr int64_t kGramTokens = 4096;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokensPerWarp = 8;

// The lowest and highest of a block's values, in every thread.
__device__ float2 block_range(float low, float high) {
  __shared__ float lows[kWarps], highs[kWarps];
  for (int offset = 16; offset > 0; offset /= 2) {
    low = fminf(low, __shfl_xor_sync(kFullWarp, low, offset));
    high = fmaxf(high, __shfl_xor_sync(kFullWarp, high, offset));
  }
  lows[threadIdx.x / 32] = low;
  highs[threadIdx.x / 32] = high;
  __syncthreads();  // every warp has entered its range
  for (int w = 0; w < kWarps; ++w) {
    low = fminf(low, lows[w]);
    high = fmaxf(high, highs[w]);
  }
  return {low, high};
}

// Step 1 of ID-Selection: importance to [0, 1] over the finite values of the real tokens; as it is where they are all
// alike or their difference overflows. +Inf becomes 2 and -Inf 0; a NaN stays one, for finite_score to put last. A
// block an image. Padding gets kOut, and best[image] the first pick's rank where `best` is not null.
__global__ void __launch_bounds__(kThreads) scale_importance(
    const float* __restrict__ importance, const bool* __restrict__ mask, int n, float* __restrict__ scores,
    Rank* best) {
  const int64_t image = blockIdx.x;
  importance += image * n;
  scores += image * n;
  const auto real = [&](int j) { return mask == nullptr || mask[image * n + j]; };
  float low = INFINITY, high = -INFINITY;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    if (!isfinite(importance[j]) || !real(j)) continue;
    low = fminf(low, importance[j]);
    high = fmaxf(high, importance[j]);
  }
  const float2 range = block_range(low, high);
  const float spread = range.y - range.x;  // -inf where nothing is finite
  const bool scale = spread > 1e-9f && spread < INFINITY;

  Candidate<State> mine;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    const float s = importance[j];
    const float scaled = isinf(s) ? (s > 0.0f ? 2.0f : 0.0f) : scale ? (s - range.x) / spread : s;
    scores[j] = real(j) ? finite_score(scaled) : kOut;
    if (const Rank rank = ranked(scores[j], j); real(j) && rank > mine.rank) mine = {rank, {scores[j]}};
  }
  if (best == nullptr) return;
  __shared__ BlockTeam<State>::Shared shared;
  const Candidate<State> first = BlockTeam<State>{shared}.best(mine);
  if (threadIdx.x == 0) best[image] = first.rank;
}

// One pick, known by its rank from the launch before: emits it, brings the other tokens' scores up to date, and enters
// the highest of them in next[image]. A warp computes the cosines of kTokensPerWarp tokens, one after the other.
template <class T>
__global__ void __launch_bounds__(kThreads) suppress_by_row(
    const T* __restrict__ x, const float* __restrict__ scale, int n, int64_t d, Suppression rule, int64_t step,
    int64_t k, int64_t blocks_per_image, const Rank* __restrict__ best, Rank* next, float* scores,
    int64_t* __restrict__ picks) {
  const int64_t image = blockIdx.x / blocks_per_image, block = blockIdx.x % blocks_per_image;
  x += image * n * d;
  scale += image * n;
  scores += image * n;
  const Rank rank = best[image];
  const bool found = rank != 0 && rule.pickable(key_of(rank));
  const int i = found ? index_of(rank) : -1;
  if (block == 0 && threadIdx.x == 0) picks[image * k + step] = i;
  if (!found || step + 1 == k) return;  // the whole block
  const State picked{key_of(rank)};

  const int lane = threadIdx.x % 32;
  const int64_t first = (block * kWarps + threadIdx.x / 32) * kTokensPerWarp;
  Candidate<State> mine;
  for (int64_t j = first; j < first + kTokensPerWarp && j < n; ++j) {
    if (j == i && lane == 0) scores[j] = kOut;
    State s{__shfl_sync(kFullWarp, lane == 0 ? scores[j] : 0.0f, 0)};  // one lane reads what it alone writes
    if (s.score == kOut) continue;
    if (rule.matters(picked)) {
      float dot = 0.0f;
      if (scale[i] > 0.0f && scale[j] > 0.0f) {  // a NaN times 0 would stay NaN
        for (int64_t c = lane; c < d; c += 32) dot += value(x[i * d + c]) * scale[i] * (value(x[j * d + c]) * scale[j]);
      }
      rule.update(s, picked, warp_sum(dot));
      if (lane == 0) scores[j] = s.score;
    }
    const Rank mine_rank = ranked(rule.key(s), static_cast<int>(j));
    if (mine_rank > mine.rank) mine = {mine_rank, s};
  }
  __shared__ BlockTeam<State>::Shared shared;
  const Candidate<State> highest = BlockTeam<State>{shared}.best(mine);
  if (threadIdx.x == 0) atomicMax(next + image, highest.rank);
}

template <class T>
cudaError_t pick_by_rows(
    const T* x, int64_t images, int64_t n, int64_t d, int64_t k, const Suppression& rule, const float* scale,
    Rank* best, float* scores, int64_t* picks, cudaStream_t stream) {
  const int64_t per_image = ceil_div(n, kWarps * kTokensPerWarp);
  for (int64_t step = 0; step < k; ++step, best += images) {
    LVTP_TRY(launch(
        suppress_by_row<T>, blocks(images * per_image), kThreads, 0, stream, x, scale, static_cast<int>(n), d, rule,
        step, k, per_image, best, best + images, scores, picks));
  }
  return cudaSuccess;
}

}  // namespace

// Gram: similarity, scores, scale. Rows: k + 1 ranks an image, scores, scale.
int64_t id_selection_workspace(int64_t images, int64_t n, int64_t k) {
  constexpr int64_t kFloat = sizeof(float), kRank = sizeof(Rank);
  return images * ((n <= kGramTokens ? n * n * kFloat : (k + 1) * kRank) + 2 * n * kFloat);
}

cudaError_t id_selection(
    const void* features, Dtype dtype, const float* importance, const bool* mask, int64_t images, int64_t n, int64_t d,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream) {
  const bool by_rows = n > kGramTokens;
  auto* best = static_cast<Rank*>(workspace);
  auto* similarity = static_cast<float*>(workspace);
  float* scores = by_rows ? reinterpret_cast<float*>(best + images * (k + 1)) : similarity + images * n * n;
  float* scale = scores + images * n;

  const size_t ranks = by_rows ? images * (k + 1) * sizeof(Rank) : 0;
  if (by_rows) {
    LVTP_TRY(cudaMemsetAsync(best, 0, ranks, stream));
  }
  LVTP_TRY(launch(
      scale_importance, blocks(images), kThreads, 0, stream, importance, mask, static_cast<int>(n), scores,
      by_rows ? best : nullptr));
  if (by_rows) {
    return with_dtype(features, dtype, [&](const auto* x) {
      LVTP_TRY(launch_unit_scale(x, images * n, d, scale, stream));
      return pick_by_rows(x, images, n, d, k, suppression(gamma), scale, best, scores, picks, stream);
    });
  }
  LVTP_TRY(cosine_similarity(features, dtype, images, n, d, scale, similarity, stream));
  return greedy_suppression(scores, similarity, Dtype::kFloat, mask, images, n, k, gamma, nullptr, picks, stream);
}

}  // namespace lvtp::cuda
