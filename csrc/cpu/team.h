// Threads that work on one image together, on pieces too small to start threads for.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>

namespace lvtp::cpu {

// What one of several threads threw first, for the thread that waits for them. Out of torch's parallel_for an exception
// comes without its words: nothing may leave its function.
class Failure {
 public:
  template <class F>
  void guard(const F& fn) {
    try {
      fn();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  void rethrow() {  // once all threads are done
    if (failed_.exchange(false)) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

// fn(image) for every image, in parallel.
template <class F>
void for_each_image(int64_t images, const F& fn) {
  Failure failure;
  torch::stable::parallel_for(0, images, 1, [&](int64_t begin, int64_t end) {
    failure.guard([&] {
      for (int64_t b = begin; b < end; ++b) fn(b);
    });
  });
  failure.rethrow();
}

// One thread leads and calls run(); the others assist() until it is done. A piece belongs to whoever claims it first,
// so the leader gets through alone where no one else comes: nothing here waits for a thread to be started. Results do
// not depend on who did what, as long as pieces write to different places.
class Team {
 public:
  // piece(0), ..., piece(count - 1), each once, by any thread; all done on return. Pieces of one number are offered to
  // the same thread first, call after call, because their data lie in its cache.
  template <class F>
  void run(int64_t count, const F& piece) {
    if (alone_ || count <= 1) {
      for (int64_t i = 0; i < count; ++i) piece(i);
    } else if (count <= kShares) {
      share(count, piece);
    } else {
      share(kShares, [&](int64_t first) {
        for (int64_t i = first; i < count; i += kShares) piece(i);
      });
    }
  }

  // lead(team) on one thread, with all that torch would use.
  template <class F>
  static void lead(const F& lead) {
    Team team;
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    team.alone_ = threads == 1;
    if (team.alone_) return lead(team);
    std::atomic<bool> led{false};
    Failure failure;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      if (led.exchange(true)) return team.assist();
      failure.guard([&] { lead(team); });
      team.finished_.store(true, std::memory_order_release);
    });
    failure.rethrow();
  }

  // lead(image, team) for every image: one after the other with all threads where there are fewer images than threads,
  // else one thread an image.
  template <class F>
  static void for_each_image(int64_t images, const F& lead_image) {
    const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
    if (images < threads) {
      if (images == 0) return;
      return lead([&](Team& team) {
        for (int64_t b = 0; b < images; ++b) lead_image(b, team);
      });
    }
    cpu::for_each_image(images, [&](int64_t b) {
      Team alone;
      alone.alone_ = true;
      lead_image(b, alone);
    });
  }

 private:
  static constexpr int64_t kShares = 31;  // at most, in one round

  // All that a thread must know to claim a piece, in one word, so that no one can claim by what was true of another
  // round: a bit for each unclaimed piece, and above them the numbers of pieces and members, and of the round.
  struct Round {
    uint64_t word;
    Round(uint64_t number, uint64_t members, uint64_t count)
        : word(number << 42 | members << 37 | count << 32 | ((uint64_t{1} << count) - 1)) {}
    explicit Round(uint64_t word) : word(word) {}
    uint64_t number() const { return word >> 42; }
    uint64_t members() const { return word >> 37 & 31; }
    uint64_t count() const { return word >> 32 & 31; }
    uint32_t unclaimed() const { return static_cast<uint32_t>(word); }
    // An unclaimed one of every members()-th piece, those that are offered to this member first; -1 if there is none.
    int piece_for(uint64_t member) const {
      for (uint64_t i = member; i < count(); i += members()) {
        if (unclaimed() >> i & 1) return static_cast<int>(i);
      }
      return -1;
    }
  };

  template <class F>
  void share(int64_t count, const F& piece) {
    piece_ = &piece;
    call_ = [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); };
    left_.store(count, std::memory_order_relaxed);
    const uint64_t members = std::min<uint64_t>(members_.load(std::memory_order_relaxed), kShares);
    const Round last(round_.load(std::memory_order_relaxed));
    round_.store(Round(last.number() + 1, members, count).word, std::memory_order_release);
    for (int64_t spins = 0; left_.load(std::memory_order_acquire) != 0; ++spins) {
      if (!work_once(0, spins)) rest(spins);
    }
    failure_.rethrow();
  }

  static void rest(int64_t spins) {
    if (spins < 1000) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();  // somebody else needs this core
    }
  }

  // Claims and does a piece of this member's, or after some patience one of a member who does not come.
  bool work_once(uint64_t member, int64_t spins) {
    constexpr int kPatience = 500;  // some 20 us
    Round round(round_.load(std::memory_order_acquire));
    if (round.unclaimed() == 0 || member >= round.members()) return false;
    int i = round.piece_for(member);
    if (i < 0 && spins < kPatience) return false;
    if (i < 0) i = __builtin_ctz(round.unclaimed());
    if (!round_.compare_exchange_strong(round.word, round.word & ~(uint64_t{1} << i), std::memory_order_acq_rel)) {
      return true;
    }
    failure_.guard([&] { call_(piece_, i); });  // the leader, who waits for this piece, throws it on
    left_.fetch_sub(1, std::memory_order_release);
    return true;
  }

  void assist() {
    const uint64_t member = members_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t spins = 0; !finished_.load(std::memory_order_acquire); ++spins) {
      if (work_once(member, 0)) spins = 0;
      rest(spins);
    }
  }

  bool alone_ = false;
  const void* piece_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  std::atomic<uint64_t> members_{1};
  alignas(64) std::atomic<uint64_t> round_{0};
  alignas(64) std::atomic<int64_t> left_{0};
  std::atomic<bool> finished_{false};
  Failure failure_;
};

}  // namespace lvtp::cpu
