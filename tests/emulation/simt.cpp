// The machine behind simt.h: fibers, the choice of the next one, barriers, and what is said when nobody can go on.
#include "simt.h"

#include <link.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>

#include "fiber.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

// ------------------------------------------------------------------------------------------------- threads and blocks

enum class State { kReady, kAtBlockBarrier, kAtCollective, kAtTeamBarrier, kExited };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};

struct Thread {
  Context context;
  State state = State::kReady;
  dim3 index;
  Site site{};
  const void* team = nullptr;  // whose barrier it waits at, of so many blocks
  unsigned team_blocks = 0;
  unsigned mask = 0;
  uint64_t deposit = 0;
  bool predicate = false;
  int count = 0;
  Deposits seen{};
  std::vector<Copy> copies;  // on their way
  size_t groups = 0;         // of copies that have been ended
};

struct Block {
  dim3 index;
  unsigned rank = 0;
  std::vector<Thread> threads;
  std::vector<int> order;         // a permutation: the favoured thread comes first
  std::vector<uint64_t> waiting;  // one bit a thread that can go on, in that order
  std::vector<int> place;         // of a thread in it
  size_t arrived = 0, exited = 0;
  std::mt19937_64 random;
  char* shared_low = nullptr;  // of the static shared memory
  char* dynamic = nullptr;

  void ready(Thread& t) {
    t.state = State::kReady;
    const int at = place[&t - threads.data()];
    waiting[at / 64] |= uint64_t{1} << (at % 64);
  }
  bool idle() const {
    return std::all_of(waiting.begin(), waiting.end(), [](uint64_t bits) { return bits == 0; });
  }
  Thread& next(bool favour);
};

struct Machine {
  uint64_t seed = 0;
  std::string removed_file;
  int removed_line = 0;
  std::set<std::pair<std::string, int>> barriers;

  const std::function<void()>* body = nullptr;
  std::vector<std::unique_ptr<Block>> cluster;
  std::vector<std::unique_ptr<Stack>> stacks;
  std::string error;
  Block* block = nullptr;  // that of the thread which runs
  Thread* thread = nullptr;
  Context* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
} machine;

// The first runnable thread from the most favoured one on, or from one drawn at random.
Thread& Block::next(bool favour) {
  const size_t words = waiting.size(), start = favour ? 0 : random() % threads.size();
  for (size_t step = 0; step <= words; ++step) {
    const size_t word = (start / 64 + step) % words;
    uint64_t bits = waiting[word];
    if (step == 0) bits &= ~uint64_t{0} << (start % 64);
    if (bits == 0) continue;
    const int at = static_cast<int>(word * 64) + __builtin_ctzll(bits);
    waiting[word] &= ~(uint64_t{1} << (at % 64));
    return threads[order[at]];
  }
  throw std::logic_error("simt: no thread can go on");
}

std::string name_of(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  return std::string(site.what) + " at " + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

std::string text(dim3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

// Back to the scheduler, until the thread is chosen again.
void yield(bool for_good = false) {
  Thread& me = *machine.thread;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(
      for_good ? nullptr : &fake_stack, machine.scheduler_stack, machine.scheduler_stack_size);
#else
  static_cast<void>(for_good);
#endif
  switch_context(me.context, *machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
}

void fiber() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_stack_size);
#endif
  (*machine.body)();
  machine.thread->state = State::kExited;
  ++machine.block->exited;
  yield(true);
}

// Runs a block's threads until none can go on.
void advance(Block& block, size_t first_stack) {
  Context scheduler;
  while (machine.error.empty() && !block.idle()) {
    Thread& t = block.next(machine.seed % 2 == 1);
    machine.block = &block;
    machine.thread = &t;
    machine.scheduler = &scheduler;
    blockIdx = block.index;
    threadIdx = t.index;
#ifdef __SANITIZE_ADDRESS__
    const Stack& stack = *machine.stacks[first_stack + (&t - block.threads.data())];
    __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, stack.begin(), kStack);
#endif
    switch_context(scheduler, t.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
  }
  static_cast<void>(first_stack);
}

// The calling system thread's copy of every __shared__ variable of this library.
std::pair<char*, size_t> static_shared() {
  static thread_local char marker;
  std::pair<char*, size_t> range{&marker, 0};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        auto& found = *static_cast<std::pair<char*, size_t>*>(data);
        auto* low = static_cast<char*>(info->dlpi_tls_data);
        for (int p = 0; low && p < info->dlpi_phnum; ++p) {
          const auto& header = info->dlpi_phdr[p];
          if (header.p_type != PT_TLS || found.first < low || found.first >= low + header.p_memsz) continue;
          found = {low, header.p_memsz};
          return 1;
        }
        return 0;
      },
      &range);
  return range;
}

// Not a number, where it is read as one; a large index; and under other seeds something else.
int poison() { return machine.seed % 4 < 2 ? 0xff : 0x5a; }

void start(Block& block, dim3 shape, uint64_t number, size_t first_stack) {
  const size_t count = size_t{shape.x} * shape.y * shape.z;
  block.random.seed(machine.seed * 1000003 + number);
  block.order.resize(count);
  std::iota(block.order.begin(), block.order.end(), 0);
  std::shuffle(block.order.begin(), block.order.end(), block.random);
  block.place.resize(count);
  for (size_t at = 0; at < count; ++at) block.place[block.order[at]] = static_cast<int>(at);
  block.waiting.assign((count + 63) / 64, 0);
  block.threads = std::vector<Thread>(count);
  for (size_t t = 0; t < count; ++t) {
    const auto x = static_cast<unsigned>(t);
    block.threads[t].index = {x % shape.x, x / shape.x % shape.y, x / shape.x / shape.y};
    const Stack& stack = *machine.stacks[first_stack + t];
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack.begin(), kStack);  // what the last fiber left there
#endif
    block.threads[t].context.start(stack, fiber);
    block.ready(block.threads[t]);
  }
}

// "3 threads, the first of them (0, 0, 0), wait in __syncthreads at greedy.cuh:44; 29 threads, ... have exited"
std::string who_waits_where(const Block& block) {
  std::map<std::string, std::vector<const Thread*>> groups;
  for (const Thread& t : block.threads) {
    groups[t.state == State::kExited ? "have exited" : "wait in " + name_of(t.site)].push_back(&t);
  }
  std::string out = "block " + text(block.index) + ": ";
  for (const auto& [what, who] : groups) {
    out += std::to_string(who.size()) + " threads, the first of them " + text(who[0]->index) + ", " + what + "; ";
  }
  return out.substr(0, out.size() - 2);
}

// Teams whose blocks have all come, with all their threads.
void release_team_barriers() {
  std::map<const void*, std::vector<Block*>> teams;
  for (const auto& block : machine.cluster) {
    const void* const team = block->threads[0].team;
    if (std::all_of(block->threads.begin(), block->threads.end(), [&](const Thread& t) {
          return t.state == State::kAtTeamBarrier && t.team == team;
        })) {
      teams[team].push_back(block.get());
    }
  }
  for (const auto& [team, members] : teams) {
    if (members.size() < members[0]->threads[0].team_blocks) continue;
    for (Block* block : members) {
      for (Thread& t : block->threads) block->ready(t);
    }
  }
}

// One cluster. Every block but a lone one has a system thread of its own; they take turns, so only one ever runs.
void run_cluster(dim3 shape, size_t dynamic_bytes) {
  const size_t per_block = size_t{shape.x} * shape.y * shape.z;
  std::vector<std::unique_ptr<char, void (*)(char*)>> memory;
  for (const auto& block : machine.cluster) {
    memory.emplace_back(static_cast<char*>(operator new(dynamic_bytes, std::align_val_t{128})), [](char* p) {
      operator delete(p, std::align_val_t{128});
    });
    block->dynamic = memory.back().get();
    memset(block->dynamic, poison(), dynamic_bytes);
  }
  const auto prepare = [&](Block& block) {
    const auto [low, bytes] = static_shared();
    block.shared_low = low;
#ifndef __SANITIZE_ADDRESS__
    memset(low, poison(), bytes);
#endif
  };

  std::mutex mutex;
  std::condition_variable changed;
  int turn = -1;
  constexpr int kEnd = -2;
  std::vector<std::thread> workers;
  const size_t blocks = machine.cluster.size();
  for (size_t r = 0; blocks > 1 && r < blocks; ++r) {
    workers.emplace_back([&, r] {
      std::unique_lock lock(mutex);
      prepare(*machine.cluster[r]);
      while (true) {
        changed.wait(lock, [&] { return turn == static_cast<int>(r) || turn == kEnd; });
        if (turn == kEnd) return;
        advance(*machine.cluster[r], r * per_block);
        turn = -1;
        changed.notify_all();
      }
    });
  }
  if (blocks == 1) prepare(*machine.cluster[0]);

  std::mt19937_64 random(machine.seed);
  while (machine.error.empty()) {
    std::vector<int> able;
    for (size_t r = 0; r < blocks; ++r) {
      if (!machine.cluster[r]->idle()) able.push_back(static_cast<int>(r));
    }
    if (able.empty()) break;
    if (blocks == 1) {
      advance(*machine.cluster[0], 0);
    } else {
      std::unique_lock lock(mutex);
      turn = able[random() % able.size()];
      changed.notify_all();
      changed.wait(lock, [&] { return turn == -1; });
    }
    release_team_barriers();
  }
  {
    const std::lock_guard lock(mutex);
    turn = kEnd;
  }
  changed.notify_all();
  for (auto& worker : workers) worker.join();

  for (const auto& block : machine.cluster) {
    if (!machine.error.empty() || block->exited == per_block) continue;
    machine.error = "deadlock: " + who_waits_where(*block);
  }
}

bool is_removed(const Site& site) {
  if (site.line != machine.removed_line) return false;
  const char* slash = strrchr(site.file, '/');
  return machine.removed_file == (slash ? slash + 1 : site.file);
}

void note(const Site& site) {
  const char* slash = strrchr(site.file, '/');
  machine.barriers.emplace(slash ? slash + 1 : site.file, site.line);
}

void wait(const Site& site, State state) {
  machine.thread->site = site;
  machine.thread->state = state;
}

}  // namespace

// ------------------------------------------------------------------------------------------------- what kernels call

void fail(const Site& site, const char* why) {
  machine.error = "block " + text(machine.block->index) + ", thread " + text(machine.thread->index) + ": " +
                  name_of(site) + " " + why;
  yield(true);
  abort();
}

unsigned lane() { return static_cast<unsigned>(machine.thread - machine.block->threads.data()) % 32; }
unsigned cluster_rank() { return machine.block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(machine.cluster.size()); }
void* dynamic_shared() { return machine.block->dynamic; }

void* shared_of(void* mine, unsigned rank) {
  const Block &me = *machine.block, &other = *machine.cluster[rank];
  auto* at = static_cast<char*>(mine);
  const bool is_static = at >= me.shared_low && at < me.shared_low + static_shared().second;
  return is_static ? other.shared_low + (at - me.shared_low) : other.dynamic + (at - me.dynamic);
}

const Deposits& exchange(const Site& site, unsigned mask, uint64_t deposit, void (*together)(const Deposits&)) {
  Thread& me = *machine.thread;
  Block& block = *machine.block;
  if (is_removed(site)) return me.seen;
  if (!(mask >> lane() & 1)) fail(site, "is not named by its own mask");
  wait(site, State::kAtCollective);
  me.mask = mask;
  me.deposit = deposit;

  const size_t first = static_cast<size_t>(&me - block.threads.data()) / 32 * 32;
  bool complete = true;
  for (size_t l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (first + l >= block.threads.size()) fail(site, "names a lane that the block does not have");
    const Thread& t = block.threads[first + l];
    if (t.state == State::kExited) fail(site, "names a lane that has exited");
    if (t.state != State::kAtCollective) {
      complete = false;
    } else if (t.mask != mask || strcmp(t.site.what, site.what) != 0) {
      fail(site, ("names a lane that waits, with a mask of its own, in " + name_of(t.site)).c_str());
    }
  }
  if (complete) {
    if (strcmp(site.what, "__syncwarp") == 0) note(site);
    for (size_t l = 0; l < 32; ++l) {
      if (!(mask >> l & 1)) continue;
      Thread& t = block.threads[first + l];
      for (size_t other = 0; other < 32; ++other) {
        if (mask >> other & 1) t.seen[other] = block.threads[first + other].deposit;
      }
      block.ready(t);
    }
    if (together != nullptr) together(me.seen);
  }
  yield();
  return me.seen;
}

void copy_async(void* to, const void* from, size_t bytes) {
  memset(to, poison(), bytes);
  machine.thread->copies.push_back({to, from, bytes, machine.thread->groups});
}

void end_copies() { ++machine.thread->groups; }

void await_copies(const Site& site, size_t pending) {
  if (is_removed(site)) return;
  note(site);
  Thread& me = *machine.thread;
  const auto waits = [&](const Copy& copy) { return copy.group + pending >= me.groups; };
  for (const Copy& copy : me.copies) {
    if (waits(copy)) break;
    if (copy.from != nullptr) {
      memcpy(copy.to, copy.from, copy.bytes);
    } else {
      memset(copy.to, 0, copy.bytes);
    }
  }
  me.copies.erase(me.copies.begin(), std::find_if(me.copies.begin(), me.copies.end(), waits));
}

int block_barrier(const Site& site, bool predicate) {
  Thread& me = *machine.thread;
  Block& block = *machine.block;
  if (is_removed(site)) return predicate ? 1 : 0;
  wait(site, State::kAtBlockBarrier);
  me.predicate = predicate;
  if (++block.arrived == block.threads.size()) {
    note(site);
    block.arrived = 0;
    int count = 0;
    for (const Thread& t : block.threads) {
      if (t.site.line != site.line || t.site.file != site.file) {
        fail(site, ("meets threads of its block in " + name_of(t.site)).c_str());
      }
      count += t.predicate;
    }
    for (Thread& t : block.threads) {
      t.count = count;
      block.ready(t);
    }
  }
  yield();
  return me.count;
}

void cluster_barrier(const Site& site) { team_barrier(site, nullptr, cluster_size()); }

void team_barrier(const Site& site, const unsigned* team, unsigned blocks) {
  if (is_removed(site)) return;
  note(site);
  machine.thread->team = team;
  machine.thread->team_blocks = blocks;
  wait(site, State::kAtTeamBarrier);
  yield();
}

void run(dim3 grid, dim3 block, size_t dynamic_bytes, unsigned together, const std::function<void()>& thread) {
  if (together == 0 || together > 16 || grid.x % together != 0) {
    throw std::runtime_error("simt: the grid is no multiple of the cluster, or that has more than 16 blocks");
  }
  gridDim = grid;
  blockDim = block;
  machine.body = &thread;
  machine.error.clear();
  const size_t per_block = size_t{block.x} * block.y * block.z;
  while (machine.stacks.size() < per_block * together) machine.stacks.push_back(std::make_unique<Stack>());
  machine.cluster.clear();
  for (unsigned r = 0; r < together; ++r) machine.cluster.push_back(std::make_unique<Block>());

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t first = 0; first < blocks; first += together) {
    for (unsigned r = 0; r < together; ++r) {
      Block& b = *machine.cluster[r];
      const auto number = static_cast<unsigned>(first) + r;
      b.rank = r;
      b.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
      b.arrived = b.exited = 0;
      start(b, block, number, r * per_block);
    }
    run_cluster(block, dynamic_bytes);
    if (!machine.error.empty()) throw std::runtime_error("simt: " + machine.error);
  }
}

void set_seed(uint64_t seed) { machine.seed = seed; }

void remove_barrier(const std::string& file, int line) {
  machine.removed_file = file;
  machine.removed_line = line;
}

std::vector<std::pair<std::string, int>> barriers() { return {machine.barriers.begin(), machine.barriers.end()}; }

}  // namespace simt
