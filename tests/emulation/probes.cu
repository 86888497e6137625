#include "probes.h"

#include <map>
#include <stdexcept>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace lvtp::cuda;

__global__ void indices(int* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(threadIdx.x); }

__global__ void reversed(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void missing_barrier(int* out) {
  __shared__ int values[64];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void stale_shared(int* out) {
  __shared__ int values[64];
  out[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1;
}

__global__ void stale_dynamic(int* out) {
  auto* values = static_cast<int*>(simt::dynamic_shared());
  out[threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1;
}

__global__ void past_the_end(int* out) {
  __shared__ int values[64];
  values[threadIdx.x + 1] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void warp_operations(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  constexpr unsigned kAll = 0xffffffffu;
  int sum = lane;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  const int checks[] = {
      sum == 496,
      __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u,
      __reduce_max_sync(kAll, static_cast<unsigned>(lane ^ 5)) == 31,
      __reduce_min_sync(kAll, lane - 7) == -7,
      __reduce_add_sync(kAll, lane) == 496,
      __shfl_up_sync(kAll, lane, 3) == (lane < 3 ? lane : lane - 3),
      __shfl_down_sync(kAll, lane, 3, 8) == (lane % 8 > 4 ? lane : lane + 3),
      __shfl_sync(kAll, lane, 9, 8) == lane / 8 * 8 + 1,
      __any_sync(kAll, lane == 4) == 1,
      __all_sync(kAll, lane != 4) == 0,
  };
  int passed = 0;
  for (const int check : checks) passed += check;
  if (lane < 16) passed += __shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1);
  out[threadIdx.x] = passed - (lane < 16);
}

__global__ void votes_of_a_block(int* out) {
  const auto t = static_cast<int>(threadIdx.x);
  const int count = __syncthreads_count(t % 2), any = __syncthreads_or(t == 5), all = __syncthreads_and(t != 5);
  out[t] = count == 32 && any == 1 && all == 0;
}

__global__ void atomics(int* out) {
  atomicAdd(out, 1);
  atomicMax(out + 1, static_cast<int>(threadIdx.x));
  atomicCAS(out + 2, 0, static_cast<int>(threadIdx.x) + 1);
}

__global__ void cluster_neighbours(int* out) {
  __shared__ int mine;
  auto* dynamic = static_cast<int*>(simt::dynamic_shared());
  if (threadIdx.x == 0) mine = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) *dynamic = 100 + static_cast<int>(blockIdx.x);
  const simt::Site site{"cluster barrier", __FILE__, __LINE__};
  simt::cluster_barrier(site);
  const unsigned next = (simt::cluster_rank() + 1) % simt::cluster_size();
  if (threadIdx.x == 0) out[blockIdx.x * 2] = *static_cast<int*>(simt::shared_of(&mine, next));
  if (threadIdx.x == 0) out[blockIdx.x * 2 + 1] = *static_cast<int*>(simt::shared_of(dynamic, next));
  simt::cluster_barrier(site);
}

// Two teams of two blocks, the second of which waits for each other twice as often: what a block wrote last is read by
// the other of its team.
__global__ void teams(int* out) {
  static unsigned arrivals[2];
  const unsigned team = blockIdx.x / 2, other = blockIdx.x ^ 1u;
  int seen = 0;
  for (int step = 0; step < 4 + 4 * static_cast<int>(team); ++step) {
    if (threadIdx.x == 0) out[blockIdx.x] = step;
    team_barrier(arrivals + team, 2);
    seen += out[other] == step;
    team_barrier(arrivals + team, 2);
  }
  if (threadIdx.x == 0) out[4 + blockIdx.x] = seen;
}

// What a thread sees of two groups of copies, the second of zeros: before a wait, after one for the first group, and
// after one for both.
__global__ void copies(int* out) {
  const auto t = static_cast<int>(threadIdx.x);
  alignas(16) static const int source[4] = {1, 2, 3, 4};
  auto* mine = reinterpret_cast<int*>(dynamic_shared()) + t;
  *mine = 7;
  cp_async<4>(mine, source + t % 4, t < 32);
  cp_async_commit();
  const int at_once = *mine;
  cp_async_wait<1>();
  const int still = *mine;
  cp_async_wait<0>();
  out[t] = at_once != 7 && at_once == still && *mine == (t < 32 ? t % 4 + 1 : 0);
}

// A 16 x 16 product on the tensor cores, small integers in bf16 and tf32, against the sum itself.
template <class T>
__device__ int wrong_products() {
  constexpr int kDepth = 32 / sizeof(T);
  alignas(16) __shared__ T a[16][kDepth], b[16][kDepth];
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const auto left = [](int r, int k) { return static_cast<float>((r * 7 + k * 3) % 11); };
  const auto right = [](int r, int k) { return static_cast<float>((r * 5 + k * k) % 13 - 6); };
  for (int e = lane; e < 16 * kDepth; e += 32) {
    const int r = e / kDepth, k = e % kDepth;
    if constexpr (sizeof(T) == 4) {
      a[r][k] = left(r, k), b[r][k] = right(r, k);
    } else {
      a[r][k] = __float2bfloat16(left(r, k)), b[r][k] = __float2bfloat16(right(r, k));
    }
  }
  __syncwarp();
  const auto half_row = [](auto& tile, LanePlace at) { return &tile[at.row][at.half * (kDepth / 2)]; };
  const Fragment rows = load_fragment(half_row(a, place_in_a(lane)));
  const Fragment columns = load_fragment(half_row(b, place_in_b(lane)));
  float c[2][4] = {};
  for (float& start : c[0]) start = 100.0f;
  for (int half = 0; half < 2; ++half) mma<T>(c[half], rows.word, columns.word[2 * half], columns.word[2 * half + 1]);
  int wrong = 0;
  for (int e = 0; e < 8; ++e) {
    const int r = e / 2 % 2 * 8 + lane / 4, j = e / 4 * 8 + lane % 4 * 2 + e % 2;
    float sum = e < 4 ? 100.0f : 0.0f;
    for (int k = 0; k < kDepth; ++k) sum += left(r, k) * right(j, k);
    wrong += sum != c[e / 4][e % 4];
  }
  return wrong;
}

__global__ void tensor_cores(int* out) {
  out[threadIdx.x] = threadIdx.x < 32 ? wrong_products<__nv_bfloat16>() : wrong_products<float>();
}

__global__ void misaligned_copy(int*) { cp_async<16>(dynamic_shared() + 4, dynamic_shared(), true); }

__global__ void some_threads_skip_a_barrier(int*) {
  if (threadIdx.x != 7) __syncthreads();
}

__global__ void two_barriers_at_once(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void a_lane_does_not_come(int* out) {
  if (threadIdx.x != 3) out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void masks_differ(int* out) { out[0] = __shfl_sync(threadIdx.x < 8 ? 0xffu : 0xffffffffu, 1, 0); }

__global__ void reads_an_unnamed_lane(int* out) {
  if (threadIdx.x < 8) out[0] = __shfl_sync(0xffu, 1, 9);
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[0] = __shfl_sync(0xffffffffu, 1, 0);
}

__global__ void half_a_cluster_waits(int*) {
  if (blockIdx.x == 1) simt::cluster_barrier({"cluster barrier", __FILE__, __LINE__});
}

struct Probe {
  void (*kernel)(int*);
  unsigned blocks, threads, together;
};

}  // namespace

void simt_probe(const std::string& name, int* out) {
  static const std::map<std::string, Probe> probes = {
      {"indices", {indices, 3, 64, 1}},
      {"reversed", {reversed, 1, 64, 1}},
      {"missing_barrier", {missing_barrier, 1, 64, 1}},
      {"stale_shared", {stale_shared, 2, 64, 1}},
      {"stale_dynamic", {stale_dynamic, 2, 64, 1}},
      {"past_the_end", {past_the_end, 1, 64, 1}},
      {"warp_operations", {warp_operations, 1, 64, 1}},
      {"votes_of_a_block", {votes_of_a_block, 1, 64, 1}},
      {"atomics", {atomics, 2, 64, 1}},
      {"cluster_neighbours", {cluster_neighbours, 8, 64, 4}},
      {"teams", {teams, 4, 64, 4}},
      {"teams_of_lone_blocks", {teams, 4, 64, 1}},
      {"copies", {copies, 1, 64, 1}},
      {"tensor_cores", {tensor_cores, 1, 64, 1}},
      {"misaligned_copy", {misaligned_copy, 1, 32, 1}},
      {"some_threads_skip_a_barrier", {some_threads_skip_a_barrier, 1, 64, 1}},
      {"two_barriers_at_once", {two_barriers_at_once, 1, 64, 1}},
      {"a_lane_does_not_come", {a_lane_does_not_come, 1, 32, 1}},
      {"masks_differ", {masks_differ, 1, 32, 1}},
      {"reads_an_unnamed_lane", {reads_an_unnamed_lane, 1, 32, 1}},
      {"barrier_against_shuffle", {barrier_against_shuffle, 1, 32, 1}},
      {"half_a_cluster_waits", {half_a_cluster_waits, 2, 32, 2}},
  };
  const Probe& p = probes.at(name);
  simt::run(p.blocks, p.threads, 64 * sizeof(int), p.together, [&] { p.kernel(out); });
}
