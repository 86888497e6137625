#include "greedy.cuh"

namespace lvtp::cuda {
namespace {

constexpr int kThreads = 128, kRegisters = 2;
constexpr int kBlocks =
    8;  // of suppress_in_groups on a multiprocessor; unasked, the compiler aims at more of them and spills
constexpr int kNoGroup = -1;

// leader[j]: the lowest real token with j's label, which stands for their group; labels need no bound then. A warp a
// token.
__global__ void __launch_bounds__(kThreads) find_leaders(
    const int64_t* __restrict__ labels, const bool* __restrict__ mask, int64_t tokens, int n, int* __restrict__ leader,
    bool* __restrict__ kept) {
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (token >= tokens) return;  // the whole warp
  const int lane = threadIdx.x % 32, j = static_cast<int>(token % n);
  const int64_t first = token - j;
  int found = kNoGroup;
  for (int base = 0; base <= j && found == kNoGroup && (mask == nullptr || mask[token]); base += 32) {
    const int i = base + lane;
    const bool same = i <= j && (mask == nullptr || mask[first + i]) && labels[first + i] == labels[token];
    if (const unsigned votes = __ballot_sync(kFullWarp, same); votes != 0) found = base + __ffs(votes) - 1;
  }
  if (lane == 0) {
    leader[token] = found;
    kept[token] = false;
  }
}

// The members of j's group, ascending, at `members` + an offset that no other group of the image shares, which is
// returned through `members`. Returns how many there are.
__device__ int gather_members(const int* leader, int j, int n, int lane, int*& members) {
  int size = 0, before = 0;
  for (int base = 0; base < n; base += 32) {
    const int theirs = base + lane < n ? leader[base + lane] : kNoGroup;
    before += __popc(__ballot_sync(kFullWarp, theirs != kNoGroup && theirs < j));
  }
  members += before;
  for (int base = j / 32 * 32; base < n; base += 32) {
    const bool member = base + lane < n && leader[base + lane] == j;
    const unsigned votes = __ballot_sync(kFullWarp, member);
    if (member) members[size + __popc(votes & ((1u << lane) - 1))] = base + lane;
    size += __popc(votes);
  }
  __syncwarp();  // every lane's members are written
  return size;
}

// Groups never interact: the warp of each group's leader runs the greedy loop on its members alone.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) suppress_in_groups(
    const float* __restrict__ scores, const T* __restrict__ similarity, const float* __restrict__ thresholds,
    float threshold, const int* __restrict__ leader, int64_t tokens, int n, int* members, Slot<GroupNms>* slots,
    bool* __restrict__ kept) {
  using State = GroupNms::State;
  const int64_t token = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (token >= tokens) return;  // the whole warp, here and below
  const int lane = threadIdx.x % 32, j = static_cast<int>(token % n);
  if (leader[token] != j) return;
  const int64_t image = token / n, first = token - j;
  scores += first;
  similarity += first * n;
  kept += first;
  int* mine = members + first;
  const int size = gather_members(leader + first, j, n, lane, mine);
  slots += mine - members;

  greedy<kRegisters, false>(
      GroupNms{thresholds != nullptr ? thresholds[image] : threshold}, WarpTeam<State>{}, size, size, slots,
      [&](int m, State& s) {
        const float score = scores[mine[m]];
        s = {score != score ? kOut : score, 0, false};
        return true;
      },
      [&](int m, int i) { return value(similarity[static_cast<int64_t>(mine[i]) * n + mine[m]]); },
      [&](int64_t, int i, const State&) { kept[mine[i]] = true; });
}

}  // namespace

int64_t cluster_nms_workspace(int64_t images, int64_t n) {
  return images * n * static_cast<int64_t>(sizeof(Slot<GroupNms>) + 2 * sizeof(int));
}

cudaError_t cluster_nms(
    const float* scores, const int64_t* labels, const void* similarity, Dtype dtype, const float* thresholds,
    float threshold, const bool* mask, int64_t images, int64_t n, void* workspace, bool* kept, cudaStream_t stream) {
  const int64_t tokens = images * n;
  auto* slots = static_cast<Slot<GroupNms>*>(workspace);
  auto* leader = reinterpret_cast<int*>(slots + tokens);
  int* members = leader + tokens;
  const unsigned grid = blocks(ceil_div(tokens, kThreads / 32));
  const auto size = static_cast<int>(n);
  LVTP_TRY(launch(find_leaders, grid, kThreads, 0, stream, labels, mask, tokens, size, leader, kept));
  return with_dtype(similarity, dtype, [&](const auto* sim) {
    return launch(
        suppress_in_groups<std::decay_t<decltype(*sim)>>, grid, kThreads, 0, stream, scores, sim, thresholds, threshold,
        leader, tokens, size, members, slots, kept);
  });
}

}  // namespace lvtp::cuda
