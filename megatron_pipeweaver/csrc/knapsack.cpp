#include "knapsack.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace pipeweaver {

namespace {

constexpr i32 kRoundsPerGreedy = 40;

class Solver {
 public:
  Solver(const Knapsack& knapsack) : k_(knapsack), items_(static_cast<i32>(knapsack.begin.size())) {
    i32 slots = 0;
    for (i32 i = 0; i < items_; ++i) slots = std::max(slots, k_.until[i]);
    price_.assign(slots, 0);
    used_.assign(slots + 1, 0);
    toll_.assign(slots + 1, 0);
    levels();
  }

  KnapsackChoice solve(double gap, i32 rounds) {
    KnapsackChoice best;
    if (!greedy(best)) return best;
    double bound = raise(best, 0);
    double scale = 1;
    for (i32 round = 0; round < rounds && !close(best, bound, gap); ++round) {
      const double found = raise(best, scale);
      scale = found > bound ? std::min(1.5, scale * 1.1) : scale * 0.93;
      bound = std::max(bound, found);
      if (round % kRoundsPerGreedy == kRoundsPerGreedy - 1) greedy(best);
    }
    // Rounding errors of the sums stay far below the margin.
    best.bound = std::max<i64>(0, static_cast<i64>(std::floor(bound * (1 - 1e-9))));
    best.bound = std::min(best.bound, best.latency);
    return best;
  }

 private:
  struct Step {
    double worth;
    i32 item, level;
  };

  static bool close(const KnapsackChoice& best, double bound, double gap) {
    return static_cast<double>(best.latency) <= bound * (1 + gap);
  }

  // Per item its candidates, leanest first, without those that another one beats in both.
  void levels() {
    begin_.push_back(0);
    std::vector<i32> order;
    for (i32 i = 0; i < items_; ++i) {
      order.clear();
      for (i32 c = k_.candidate_begin[i]; c < k_.candidate_begin[i + 1]; ++c) order.push_back(c);
      std::sort(order.begin(), order.end(), [&](i32 a, i32 b) {
        if (k_.memory[a] != k_.memory[b]) return k_.memory[a] < k_.memory[b];
        return k_.latency[a] < k_.latency[b];
      });
      for (const i32 c : order) {
        const bool first = static_cast<i32>(level_.size()) == begin_.back();
        if (first || k_.latency[c] < k_.latency[level_.back()]) level_.push_back(c);
      }
      begin_.push_back(static_cast<i32>(level_.size()));
    }
  }

  // From the leanest, faster levels in the order of what they save per byte, weighed by the prices
  // of the slots in which it is held (by their number as long as there are none). Keeps the better
  // of the two; false if the leanest do not fit.
  bool greedy(KnapsackChoice& best) {
    std::vector<i32> level(items_, 0);
    std::vector<i64> held(price_.size(), 0);
    std::vector<Step> steps;
    const double total = toll_.back();
    const double least = total > 0 ? 0.02 * total / static_cast<double>(price_.size()) : 1;
    for (i32 i = 0; i < items_; ++i) {
      for (i32 t = k_.begin[i]; t < k_.until[i]; ++t) held[t] += k_.memory[level_[begin_[i]]];
      const double weight =
          toll_[k_.until[i]] - toll_[k_.begin[i]] + least * (k_.until[i] - k_.begin[i]) + 1e-300;
      double worth = 1e300;
      for (i32 l = 1; l < begin_[i + 1] - begin_[i]; ++l) {
        const i32 a = level_[begin_[i] + l - 1], b = level_[begin_[i] + l];
        worth = std::min(worth, static_cast<double>(k_.latency[a] - k_.latency[b]) /
                                    (weight * static_cast<double>(k_.memory[b] - k_.memory[a])));
        steps.push_back({worth, i, l});
      }
    }
    for (const i64 bytes : held) {
      if (bytes > k_.capacity) return false;
    }
    std::stable_sort(steps.begin(), steps.end(),
                     [](const Step& a, const Step& b) { return a.worth > b.worth; });
    for (const Step& step : steps) {
      const i32 i = step.item;
      if (level[i] != step.level - 1) continue;
      const i64 more =
          k_.memory[level_[begin_[i] + step.level]] - k_.memory[level_[begin_[i] + step.level - 1]];
      const i64 room = k_.capacity - more;
      const auto from = held.begin() + k_.begin[i], to = held.begin() + k_.until[i];
      if (std::any_of(from, to, [&](i64 bytes) { return bytes > room; })) continue;
      for (auto at = from; at != to; ++at) *at += more;
      level[i] = step.level;
    }
    i64 sum = 0;
    for (i32 i = 0; i < items_; ++i) sum += k_.latency[level_[begin_[i] + level[i]]];
    if (best.feasible && sum >= best.latency) return true;
    best.feasible = true;
    best.latency = sum;
    best.chosen.resize(items_);
    for (i32 i = 0; i < items_; ++i) {
      best.chosen[i] = level_[begin_[i] + level[i]] - k_.candidate_begin[i];
    }
    return true;
  }

  // One step of the prices along the subgradient (B. T. Polyak's step), and the bound they give.
  double raise(const KnapsackChoice& best, double scale) {
    if (scale > 0) {
      double norm = 0;
      for (std::size_t t = 0; t < price_.size(); ++t) {
        const double over = used_[t] - static_cast<double>(k_.capacity);
        if (over > 0 || price_[t] > 0) norm += over * over;
      }
      if (norm <= 0) return bound_;
      const double step = scale * (1.0001 * static_cast<double>(best.latency) - bound_) / norm;
      for (std::size_t t = 0; t < price_.size(); ++t) {
        price_[t] = std::max(0.0, price_[t] + step * (used_[t] - static_cast<double>(k_.capacity)));
      }
    }
    for (std::size_t t = 0; t < price_.size(); ++t) toll_[t + 1] = toll_[t] + price_[t];
    std::fill(used_.begin(), used_.end(), 0);
    bound_ = -toll_.back() * static_cast<double>(k_.capacity);
    for (i32 i = 0; i < items_; ++i) {
      const double toll = toll_[k_.until[i]] - toll_[k_.begin[i]];
      double least = 1e300, bytes = 0;
      for (i32 at = begin_[i]; at < begin_[i + 1]; ++at) {
        const auto memory = static_cast<double>(k_.memory[level_[at]]);
        const double cost = static_cast<double>(k_.latency[level_[at]]) + toll * memory;
        if (cost < least) {
          least = cost;
          bytes = memory;
        }
      }
      bound_ += least;
      used_[k_.begin[i]] += bytes;
      used_[k_.until[i]] -= bytes;
    }
    for (std::size_t t = 1; t < used_.size(); ++t) used_[t] += used_[t - 1];
    return bound_;
  }

  const Knapsack& k_;
  i32 items_;
  std::vector<i32> begin_, level_;  // item -> its levels, as candidates
  std::vector<double> price_;       // per slot
  std::vector<double> toll_;        // slot -> sum of the prices before it
  std::vector<double> used_;        // per slot: bytes when every item chooses by the prices
  double bound_ = 0;
};

}  // namespace

KnapsackChoice choose_candidates(const Knapsack& knapsack, double gap, i32 rounds) {
  const std::size_t items = knapsack.begin.size();
  if (knapsack.until.size() != items || knapsack.candidate_begin.size() != items + 1 ||
      knapsack.latency.size() != knapsack.memory.size()) {
    throw std::invalid_argument("knapsack: a list has the wrong length");
  }
  for (std::size_t i = 0; i < items; ++i) {
    if (knapsack.begin[i] < 0 || knapsack.until[i] < knapsack.begin[i] ||
        knapsack.candidate_begin[i + 1] <= knapsack.candidate_begin[i]) {
      throw std::invalid_argument("knapsack: an item has no candidate or ends before it begins");
    }
  }
  if (items > 0 &&
      static_cast<std::size_t>(knapsack.candidate_begin[items]) > knapsack.latency.size()) {
    throw std::invalid_argument("knapsack: candidates are missing");
  }
  return Solver(knapsack).solve(gap, rounds);
}

}  // namespace pipeweaver
