#include "../quotas.h"
#include "greedy.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kFastGroups = 256;  // whose counts fit in shared memory

// The best first: kept tokens, then by falling score, ties by lowest index; a NaN score comes last, after -Inf.
struct Place {
  bool kept;
  Rank rank;
  __device__ bool before(const Place& other) const { return kept != other.kept ? kept : rank > other.rank; }
};
__device__ Place place_of(const float* scores, const bool* kept, int i) {
  constexpr float kLowest = -3.402823466e38f;
  const float s = scores[i];
  return {kept[i], ranked(s != s ? kOut : fmaxf(s, kLowest), i)};
}

__device__ int nearest_group(int64_t label, int groups) {
  return label < 0 ? 0 : label >= groups ? groups - 1 : static_cast<int>(label);
}

// tau = rho n / 32 of each image. From 1 up it suppresses nothing, even where rounding makes a similarity slightly
// larger than 1.
__global__ void set_thresholds(int64_t images, int64_t n, float* __restrict__ rho) {
  const int64_t image = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (image >= images) return;
  const float tau = rho[image] * static_cast<float>(n) / 32.0f;
  rho[image] = tau < 1.0f ? tau : INFINITY;
}

// Labels that are given may lie outside [0, groups); they count as the nearest group.
__global__ void clamp_labels(
    int64_t tokens, int groups, const int64_t* __restrict__ labels, int64_t* __restrict__ out) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token < tokens) out[token] = nearest_group(labels[token], groups);
}

// The number of `flag`s at the threads before this one; `total` of the whole block is added to.
__device__ int count_before(bool flag, int (&warps)[kThreads / 32], int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(kFullWarp, flag);
  __syncthreads();  // the counts of the call before have been read
  if (lane == 0) warps[warp] = __popc(votes);
  __syncthreads();  // every warp has entered its count
  int before = total + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < kThreads / 32; ++w) {
    before += w < warp ? warps[w] : 0;
    total += warps[w];
  }
  return before;
}

// Steps 5 to 7, one block an image: quotas, then from each group its quota, what NMS kept first, the rest by score;
// written in ascending order, -1 after the last where the image has fewer real tokens than places. `counts` is
// workspace for 4 numbers a group, used where these are too many for shared memory.
__global__ void __launch_bounds__(kThreads) pick_by_quota(
    const float* __restrict__ scores, const int64_t* __restrict__ labels, const bool* __restrict__ kept,
    const bool* __restrict__ mask, int n, int groups, int64_t budget, int64_t reserved, int64_t places, int* counts,
    int64_t* __restrict__ picks) {
  const int64_t image = blockIdx.x;
  scores += image * n;
  labels += image * n;
  kept += image * n;
  picks += image * places;
  const auto real = [&](int i) { return mask == nullptr || mask[image * n + i]; };

  __shared__ int fast[4 * kFastGroups], warps[kThreads / 32];
  int* size = groups <= kFastGroups ? fast : counts + image * 4 * groups;
  int *kept_in = size + groups, *up = kept_in + groups, *quota = up + groups;
  for (int g = threadIdx.x; g < 2 * groups; g += kThreads) size[g] = 0;
  __syncthreads();  // all counts are zero
  for (int i = threadIdx.x; i < n; i += kThreads) {
    if (!real(i)) continue;
    atomicAdd(size + labels[i], 1);
    if (kept[i]) atomicAdd(kept_in + labels[i], 1);
  }
  __syncthreads();  // all tokens are counted
  if (threadIdx.x == 0) {
    int64_t present = 0;
    for (int g = 0; g < groups; ++g) present += size[g];
    const int64_t target = places < present ? places : present;
    quotas(size, kept_in, groups, budget, reserved, target, up, quota);
  }
  __syncthreads();  // the quotas are known

  int written = 0;
  for (int first = 0; first < n; first += kThreads) {
    const int i = first + static_cast<int>(threadIdx.x);
    bool take = false;
    if (i < n && real(i) && quota[labels[i]] > 0) {
      const Place mine = place_of(scores, kept, i);
      int ahead = 0;
      for (int j = 0; j < n; ++j) {
        ahead += labels[j] == labels[i] && real(j) && place_of(scores, kept, j).before(mine);
      }
      take = ahead < quota[labels[i]];
    }
    const int at = count_before(take, warps, written);
    if (take) picks[at] = i;
  }
  for (int64_t at = written + threadIdx.x; at < places; at += kThreads) picks[at] = -1;
}

struct Pieces {
  int64_t bytes;
  float *rho, *loadings, *similarity;
  int64_t* labels;
  bool* kept;
  int* counts;
  char* scratch;  // of whichever operator runs
};

Pieces divide(void* workspace, int64_t images, int64_t n, int64_t d, int64_t groups, bool with_psca) {
  Workspace w{static_cast<char*>(workspace)};
  Pieces p{};
  p.rho = w.take<float>(images);
  p.loadings = w.take<float>(images * n);
  p.labels = w.take<int64_t>(images * n);
  p.kept = w.take<bool>(images * n);
  p.counts = w.take<int>(images * 4 * groups);
  // psca is done before the similarity matrix is begun, so they share their place.
  const int64_t matrix = ceil_div(images * n * n * static_cast<int64_t>(sizeof(float)), 256) * 256;
  const int64_t mean = mean_similarity_workspace(images, n, d), nms = cluster_nms_workspace(images, n);
  const int64_t later = matrix + (mean > nms ? mean : nms);
  const int64_t components = with_psca ? psca_workspace(images, n, d, groups) : 0;
  char* const shared = w.take<char>(later > components ? later : components);
  p.similarity = reinterpret_cast<float*>(shared);
  p.scratch = shared + matrix;
  p.bytes = w.used;
  return p;
}

}  // namespace

int64_t prune_sid_workspace(int64_t images, int64_t n, int64_t d, int64_t groups, bool with_psca) {
  return divide(nullptr, images, n, d, groups, with_psca).bytes;
}

cudaError_t prune_sid(
    const void* features, Dtype dtype, const float* importance, const int64_t* labels, const bool* mask, int64_t images,
    int64_t n, int64_t d, int64_t groups, int64_t budget, int64_t reserved, bool over_features, void* workspace,
    int64_t* picks, cudaStream_t stream) {
  const Pieces p = divide(workspace, images, n, d, groups, labels == nullptr);
  const int64_t tokens = images * n;
  const auto group_count = static_cast<int>(groups);
  constexpr unsigned kSmall = 256;
  if (labels == nullptr) {
    LVTP_TRY(
        psca(features, dtype, mask, images, n, d, groups, over_features, p.similarity, p.labels, p.loadings, stream));
  } else {
    const unsigned grid = blocks(ceil_div(tokens, kSmall));
    LVTP_TRY(launch(clamp_labels, grid, kSmall, 0, stream, tokens, group_count, labels, p.labels));
  }
  const float* scores = importance != nullptr ? importance : p.loadings;

  LVTP_TRY(mean_similarity(features, dtype, mask, images, n, d, p.scratch, p.rho, stream));
  LVTP_TRY(launch(set_thresholds, blocks(ceil_div(images, kSmall)), kSmall, 0, stream, images, budget, p.rho));
  LVTP_TRY(cosine_similarity(features, dtype, images, n, d, p.similarity, stream));
  LVTP_TRY(cluster_nms(
      scores, p.labels, p.similarity, Dtype::kFloat, p.rho, 0.0f, mask, images, n, p.scratch, p.kept, stream));

  // Beyond any number of tokens only budget - reserved counts; the arithmetic of quotas() then stays far from its
  // limits.
  constexpr int64_t kPlenty = int64_t{1} << 40;
  const int64_t wanted = budget - reserved, patches = wanted < kPlenty ? wanted : kPlenty;
  const int64_t others = reserved < kPlenty ? reserved : kPlenty, places = wanted < n ? wanted : n;
  return launch(
      pick_by_quota, blocks(images), kThreads, 0, stream, scores, p.labels, p.kept, mask, static_cast<int>(n),
      group_count, patches + others, others, places, p.counts, picks);
}

}  // namespace lvtp::cuda
