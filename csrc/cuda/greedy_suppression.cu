#include "greedy.cuh"
#include "importance.cuh"

namespace lvtp::cuda {
namespace {

// Few threads with several tokens each: a pick costs a barrier and two reductions a warp, and these are what takes
// long.
constexpr int kMostThreads = 1024, kRegisters = 4, kMostRegisters = 16;

// ID-Selection's loop, one block an image: all k picks, and each pick's row of the similarity read once. Scores that
// are `raw` are scaled first.
template <int kRegisters, class T>
__global__ void __launch_bounds__(kMostThreads, 1) suppress(
    const float* __restrict__ scores, const T* __restrict__ similarity, const bool* __restrict__ mask, int n, int64_t k,
    Suppression rule, bool raw, Slot<Suppression>* slots, int64_t slots_per_image, int64_t* __restrict__ picks) {
  using State = Suppression::State;
  const int64_t image = blockIdx.x;
  scores += image * n;
  similarity += image * n * n;
  slots += image * slots_per_image;
  picks += image * k;

  const auto real = [&](int j) { return mask == nullptr || mask[image * n + j]; };
  const Scaling scaling = raw ? scaling_of(scores, n, real) : Scaling{};
  __shared__ BlockTeam<State>::Shared shared;
  const int64_t taken = greedy<kRegisters, true>(
      rule, BlockTeam<State>{shared}, n, k, slots,
      [&](int j, State& s) {
        s.score = finite_score(raw ? scaling.of(scores[j]) : scores[j]);
        return real(j);
      },
      [&](int j, int i) { return finite_similarity(value(similarity[static_cast<int64_t>(i) * n + j])); },
      [&](int64_t step, int i, const State&) { picks[step] = i; });
  for (int64_t step = taken + threadIdx.x; step < k; step += blockDim.x) picks[step] = -1;
}

int64_t slots_per_image(int64_t n) {
  constexpr int64_t kInRegisters = kMostThreads * kMostRegisters;
  return n > kInRegisters ? n - kInRegisters : 0;
}

}  // namespace

int64_t greedy_suppression_workspace(int64_t images, int64_t n) {
  return images * slots_per_image(n) * static_cast<int64_t>(sizeof(Slot<Suppression>));
}

cudaError_t greedy_suppression(
    const float* scores, bool raw, const void* similarity, Dtype dtype, const bool* mask, int64_t images, int64_t n,
    int64_t k, double gamma, void* workspace, int64_t* picks, cudaStream_t stream) {
  const auto rule = suppression(gamma);
  const int64_t wanted = ceil_div(ceil_div(n, kRegisters), 32) * 32;
  const auto threads = static_cast<unsigned>(wanted < kMostThreads ? wanted : kMostThreads);
  return with_dtype(similarity, dtype, [&](const auto* sim) {
    using T = std::decay_t<decltype(*sim)>;
    const auto kernel = wanted <= kMostThreads ? suppress<kRegisters, T> : suppress<kMostRegisters, T>;
    return launch(
        kernel, blocks(images), threads, 0, stream, scores, sim, mask, static_cast<int>(n), k, rule, raw,
        static_cast<Slot<Suppression>*>(workspace), slots_per_image(n), picks);
  });
}

}  // namespace lvtp::cuda
