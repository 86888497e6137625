#include "../shares.h"
#include "device.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 1024;

// One block for all images. Each gets its share rounded down; what that leaves goes to the largest remainders (ties:
// lowest index).
__global__ void __launch_bounds__(kThreads) share_out(
    const float* __restrict__ rho, int images, int64_t total, Shares shares, double* remainder, int64_t* budget) {
  __shared__ double warps[2][kThreads / 32];  // each every other time
  const auto sum = [&](int turn, const auto& of) {
    double mine = 0.0;
    for (int i = threadIdx.x; i < images; i += kThreads) mine += of(i);
    return block_sum(mine, warps[turn % 2]);
  };
  double low = Shares::kLow, high = Shares::kHigh;
  for (int step = 0; step < Shares::kSteps; ++step) {
    const double middle = (low + high) / 2;
    const double all = sum(step, [&](int i) { return shares.of(Shares::phi(rho[i]), middle); });
    (all <= static_cast<double>(total) ? low : high) = middle;
  }

  for (int i = threadIdx.x; i < images; i += kThreads) {
    const double share = shares.of(Shares::phi(rho[i]), low);
    budget[i] = static_cast<int64_t>(share);
    remainder[i] = shares.remainder(share);
  }
  const auto left =
      total - static_cast<int64_t>(sum(Shares::kSteps, [&](int i) { return static_cast<double>(budget[i]); }));
  for (int i = threadIdx.x; i < images; i += kThreads) {
    int64_t before = 0;
    for (int j = 0; j < images && before < left; ++j) {
      before += remainder[j] > remainder[i] || (remainder[j] == remainder[i] && j < i);
    }
    if (before < left) ++budget[i];
  }
}

struct Pieces {
  float* rho;
  double* remainder;
  void* scratch;
  int64_t bytes;
};

Pieces divide(void* workspace, int64_t images, int64_t n, int64_t d) {
  Workspace w{static_cast<char*>(workspace)};
  Pieces p{};
  p.rho = w.take<float>(images);
  p.remainder = w.take<double>(images);
  p.scratch = w.take<char>(mean_similarity_workspace(images, n, d));
  p.bytes = w.used;
  return p;
}

}  // namespace

int64_t dynamic_budget_workspace(int64_t images, int64_t n, int64_t d) { return divide(nullptr, images, n, d).bytes; }

cudaError_t dynamic_budget(
    const void* features, Dtype dtype, int64_t images, int64_t n, int64_t d, int64_t total, int64_t minimum,
    void* workspace, int64_t* budget, cudaStream_t stream) {
  const Pieces p = divide(workspace, images, n, d);
  LVTP_TRY(mean_similarity(features, dtype, nullptr, images, n, d, p.scratch, p.rho, stream));
  const Shares shares{static_cast<double>(minimum), static_cast<double>(n)};
  return launch(
      share_out, dim3(1), kThreads, 0, stream, p.rho, static_cast<int>(images), total, shares, p.remainder, budget);
}

}  // namespace lvtp::cuda
