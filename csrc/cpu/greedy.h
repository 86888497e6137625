// The greedy engine of the CPU: the loop of csrc/rules.h, lazy.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "../rules.h"

namespace lvtp::cpu {

// Similarities as the engine asks for them, for the simplest of sources: any function of two tokens.
template <class Function>
struct Similarities {
  static constexpr bool kGuesses = false;  // true: it can guess(), see Cosines in cosines.h
  Function similarity;
  std::vector<int32_t> picks{};

  void start() { picks.clear(); }  // a loop of its own: no picks yet
  void add(int32_t pick) { picks.push_back(pick); }
  // Of token j to the picks added as number begin to end - 1 -> out.
  void to(int32_t j, int64_t begin, int64_t end, float* out) const {
    for (int64_t p = begin; p < end; ++p) *out++ = similarity(j, picks[p]);
  }
  int64_t batch() const { return 1; }  // how many similarities are worth asking for at once
};
template <class Function>
Similarities(Function) -> Similarities<Function>;

// `tokens`, ascending, are those of one image that take part, `states` their initial states in the same order.
// `source` is asked for similarities only where they can matter, and `take(step, i)` receives the picks.
// Returns how many there were: k, or fewer where the rule ends the loop or the tokens do.
//
// No rule here lets a key rise, so a key that has not seen the latest picks is an upper bound on the true one. Tokens
// wait in a heap of such bounds; only the one on top is brought up to date, pick by pick, and it falls back as soon as
// another bound is higher. A token on top that has seen every pick is the true argmax, so the picks are exactly those
// of the eager loop, update for update, for a small part of its similarities.
//
// A source that can guess which pick a token resembles most saves most of the rest: that pick is tried first, out of
// turn and on a copy of the state, and its similarity is kept for the state's own update, which stays in pick order.
// (Fewer updates never make a lower key, in floating point either, so the copy's key is a bound like any other.)
template <class Rule, class Source>
class Greedy {
 public:
  using State = typename Rule::State;

  Greedy(const Rule& rule, const std::vector<int32_t>& tokens, std::vector<State> states, Source& source)
      : rule_(rule), tokens_(tokens), states_(std::move(states)), source_(source), seen_(tokens.size(), 0) {
    source.start();
    if constexpr (Source::kGuesses) tried_.resize(tokens.size());
  }

  template <class Take>
  int64_t run(int64_t k, const Take& take) {
    heap_.resize(tokens_.size());
    for (size_t j = 0; j < tokens_.size(); ++j) heap_[j] = {rule_.key(states_[j]), static_cast<int32_t>(j)};
    std::make_heap(heap_.begin(), heap_.end());
    int64_t step = 0;
    while (step < k && !heap_.empty()) {
      if (!rule_.pickable(heap_.front().key)) break;  // an upper bound on every key left
      if constexpr (Source::kGuesses) try_ahead();
      Bound bound = pop();
      const int32_t j = bound.at;
      while (behind(j) > 0 && on_top(bound)) bound.key = std::min(bound.key, catch_up(j));
      if (!rule_.pickable(bound.key)) continue;  // out of the race for good
      if (!on_top(bound)) {
        push(bound);
        continue;
      }
      take(step++, tokens_[j]);
      if (rule_.matters(states_[j])) pick(j);
    }
    return step;
  }

 private:
  struct Bound {
    float key;
    int32_t at;                                 // position in `tokens`
    bool operator<(const Bound& other) const {  // below the other in the heap: lower key, ties the higher index
      return key < other.key || (key == other.key && at > other.at);
    }
  };

  // Similarities that are known ahead of their turn, in pick order.
  struct Tried {
    static constexpr int32_t kMost = 4;
    int32_t guessed = 0, count = 0;  // guessed: how many picks have been looked at
    std::array<int32_t, kMost> pick;
    std::array<float, kMost> similarity;
  };

  bool on_top(const Bound& bound) const { return heap_.empty() || heap_.front() < bound; }
  int64_t behind(int32_t j) const { return static_cast<int64_t>(picked_.size()) - seen_[j]; }

  void pick(int32_t j) {
    picked_.push_back(j);
    source_.add(tokens_[j]);
  }

  Bound pop() {
    std::pop_heap(heap_.begin(), heap_.end());
    const Bound bound = heap_.back();
    heap_.pop_back();
    return bound;
  }
  void push(const Bound& bound) {
    heap_.push_back(bound);
    std::push_heap(heap_.begin(), heap_.end());
  }

  // How many picks there are whose likeness to token j has not been guessed yet.
  int64_t not_guessed(int32_t j) const {
    if (tried_[j].count == Tried::kMost) return 0;
    return static_cast<int64_t>(picked_.size()) - std::max(tried_[j].guessed, seen_[j]);
  }

  // Lowers the highest bounds until the highest has nothing to try; several at once where the source has threads.
  void try_ahead() {
    while (not_guessed(heap_.front().at) > 1) {
      front_.clear();
      while (front_.size() < source_.tries() && !heap_.empty() && not_guessed(heap_.front().at) > 1) {
        front_.push_back(pop());
      }
      source_.run(front_.size(), [&](int64_t i) { try_likeliest(front_[i]); });
      for (const Bound& bound : front_) push(bound);
    }
  }

  // Lowers the bound of a token by the pick that it seems to resemble most.
  void try_likeliest(Bound& bound) {
    const int32_t j = bound.at;
    Tried& tried = tried_[j];
    const auto picks = static_cast<int32_t>(picked_.size()), from = std::max(tried.guessed, seen_[j]);
    const auto p = static_cast<int32_t>(source_.guess(tokens_[j], from, picks));
    tried.guessed = picks;
    const int32_t at = tried.count++;  // in pick order, because p is none of those guessed from before
    tried.pick[at] = p;
    source_.to(tokens_[j], p, p + 1, &tried.similarity[at]);
    State state = states_[j];
    for (int32_t t = 0; t < tried.count; ++t) {
      const State& picked = states_[picked_[tried.pick[t]]];
      if (rule_.touches(state, picked)) rule_.update(state, picked, tried.similarity[t]);
    }
    bound.key = std::min(bound.key, rule_.key(state));
  }

  // Takes token j over some of the picks it has not seen. Returns its key.
  float catch_up(int32_t j) {
    const int64_t count = std::min(behind(j), source_.batch()), first = seen_[j];
    similarity_.resize(count);
    known_similarities(j, first, count);
    for (int64_t p = 0; p < count; ++p) {
      const State& picked = states_[picked_[first + p]];
      if (rule_.touches(states_[j], picked)) rule_.update(states_[j], picked, similarity_[p]);
    }
    seen_[j] += static_cast<int32_t>(count);
    return rule_.key(states_[j]);
  }

  // Of token j to the picks first, ..., first + count - 1 -> similarity_; without those tried before.
  void known_similarities(int32_t j, int64_t first, int64_t count) {
    const auto ask = [&](int64_t begin, int64_t end) {
      if (begin < end) source_.to(tokens_[j], begin, end, &similarity_[begin - first]);
    };
    int64_t from = first;
    if constexpr (Source::kGuesses) {
      Tried& tried = tried_[j];
      int32_t used = 0;
      while (used < tried.count && tried.pick[used] < first + count) {
        const int64_t p = tried.pick[used];
        ask(from, p);
        similarity_[p - first] = tried.similarity[used++];
        from = p + 1;
      }
      std::copy(tried.pick.begin() + used, tried.pick.end(), tried.pick.begin());
      std::copy(tried.similarity.begin() + used, tried.similarity.end(), tried.similarity.begin());
      tried.count -= used;
    }
    ask(from, first + count);
  }

  const Rule& rule_;
  const std::vector<int32_t>& tokens_;
  std::vector<State> states_;
  Source& source_;
  std::vector<Bound> heap_;
  std::vector<int32_t> seen_;    // how many picks a token's state knows of
  std::vector<int32_t> picked_;  // the picks that change others: positions in `tokens`
  std::vector<float> similarity_;
  std::vector<Tried> tried_;
  std::vector<Bound> front_;
};

template <class Rule, class Source, class Take>
int64_t greedy(
    const Rule& rule, const std::vector<int32_t>& tokens, std::vector<typename Rule::State> states, int64_t k,
    Source& source, const Take& take) {
  static_assert(Rule::kNeverRises, "a stale key must bound the true one");
  return Greedy<Rule, Source>(rule, tokens, std::move(states), source).run(k, take);
}

}  // namespace lvtp::cpu
