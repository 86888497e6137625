// Two ways, by shape. Up to kGramTokens tokens: the similarity matrix, then one block's loop over its rows. Beyond,
// where the matrix outgrows the caches and then the memory: no matrix; every pick's row is computed by the whole
// device, one launch a pick.
#include "greedy.cuh"
#include "importance.cuh"

namespace lvtp::cuda {
namespace {

using State = Suppression::State;

constexpr int64_t kGramTokens = 4096;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTokensPerWarp = 8;

// The scores that the picks begin with, kOut for padding, and best[image], the first pick's rank. A block an image.
__global__ void __launch_bounds__(kThreads) scale_importance(
    const float* __restrict__ importance, const bool* __restrict__ mask, int n, float* __restrict__ scores,
    Rank* best) {
  const int64_t image = blockIdx.x;
  importance += image * n;
  scores += image * n;
  const auto real = [&](int j) { return mask == nullptr || mask[image * n + j]; };
  const Scaling scaling = scaling_of(importance, n, real);
  Candidate<State> mine;
  for (int j = threadIdx.x; j < n; j += kThreads) {
    scores[j] = real(j) ? finite_score(scaling.of(importance[j])) : kOut;
    if (const Rank rank = ranked(scores[j], j); real(j) && rank > mine.rank) mine = {rank, {scores[j]}};
  }
  __shared__ BlockTeam<State>::Shared shared;
  const Candidate<State> first = BlockTeam<State>{shared}.best(mine);
  if (threadIdx.x == 0) best[image] = first.rank;
}

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// (a x) . (b y) of d features, in every lane of a warp. `wide`: both can be read 16 bytes at a time.
template <class T>
__device__ float warp_dot(const T* x, float a, const T* y, float b, int64_t d, bool wide) {
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
  if (wide) {
    const auto *xs = reinterpret_cast<const Pack<T>*>(x), *ys = reinterpret_cast<const Pack<T>*>(y);
#pragma unroll 4
    for (int64_t c = lane; c < d / Pack<T>::kSize; c += 32) {
      const Pack<T> p = xs[c], q = ys[c];
#pragma unroll
      for (int e = 0; e < Pack<T>::kSize; ++e) sum += value(p.v[e]) * a * (value(q.v[e]) * b);
    }
  } else {
    for (int64_t c = lane; c < d; c += 32) sum += value(x[c]) * a * (value(y[c]) * b);
  }
  return warp_sum(sum);
}

// One pick, known by its rank from the launch before: emits it, brings the other tokens' scores up to date, and enters
// the highest of them in next[image]. A warp computes the cosines of kTokensPerWarp tokens, one after the other.
template <class T>
__global__ void __launch_bounds__(kThreads) suppress_by_row(
    const T* __restrict__ x, const float* __restrict__ scale, int n, int64_t d, Suppression rule, int64_t step,
    int64_t k, int64_t blocks_per_image, bool wide, const Rank* __restrict__ best, Rank* next, float* scores,
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
      const bool both = scale[i] > 0.0f && scale[j] > 0.0f;  // a NaN times 0 would stay NaN
      rule.update(s, picked, both ? warp_dot(x + i * d, scale[i], x + j * d, scale[j], d, wide) : 0.0f);
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
  const bool wide = (reinterpret_cast<uintptr_t>(x) | static_cast<uint64_t>(d) * sizeof(T)) % sizeof(Pack<T>) == 0;
  for (int64_t step = 0; step < k; ++step, best += images) {
    LVTP_TRY(launch(
        suppress_by_row<T>, blocks(images * per_image), kThreads, 0, stream, x, scale, static_cast<int>(n), d, rule,
        step, k, per_image, wide, best, best + images, scores, picks));
  }
  return cudaSuccess;
}

}  // namespace

// Gram: the similarity. Rows: k + 1 ranks an image, scores, scale.
int64_t id_selection_workspace(int64_t images, int64_t n, int64_t k) {
  constexpr int64_t kFloat = sizeof(float), kRank = sizeof(Rank);
  return images * (n <= kGramTokens ? n * n * kFloat : (k + 1) * kRank + 2 * n * kFloat);
}

cudaError_t id_selection(
    const void* features, Dtype dtype, const float* importance, const bool* mask, int64_t images, int64_t n, int64_t d,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream) {
  if (n <= kGramTokens) {
    auto* similarity = static_cast<float*>(workspace);
    LVTP_TRY(cosine_similarity(features, dtype, images, n, d, similarity, stream));
    return greedy_suppression(
        importance, true, similarity, Dtype::kFloat, mask, images, n, k, gamma, nullptr, picks, stream);
  }
  auto* best = static_cast<Rank*>(workspace);
  float* scores = reinterpret_cast<float*>(best + images * (k + 1));
  float* scale = scores + images * n;
  LVTP_TRY(cudaMemsetAsync(best, 0, images * (k + 1) * sizeof(Rank), stream));
  const auto size = static_cast<int>(n);
  LVTP_TRY(launch(scale_importance, blocks(images), kThreads, 0, stream, importance, mask, size, scores, best));
  return with_dtype(features, dtype, [&](const auto* x) {
    LVTP_TRY(launch_unit_scale(x, images * n, d, scale, stream));
    return pick_by_rows(x, images, n, d, k, suppression(gamma), scale, best, scores, picks, stream);
  });
}

}  // namespace lvtp::cuda
