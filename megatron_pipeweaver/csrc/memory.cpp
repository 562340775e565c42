#include "memory.hpp"

#include <algorithm>

namespace pipeweaver {

MemoryChooser::MemoryChooser(const Model& model)
    : m_(model), from_(model.pairs, 0), until_(model.pairs, 0) {}

// The stage pairs of `rank`, each with the forwards that start while it is held.
void MemoryChooser::measure(const Timetable& table, i32 rank) {
  const i32 last = table.split ? kWeight : kBackward;
  forwards_ = 0;
  pairs_.clear();
  for (const i32 op : table.order[rank]) {
    const i32 pair = pair_of(op);
    if (kind_of(op) == kForward) {
      from_[pair] = forwards_++;
      until_[pair] = forwards_;
      pairs_.push_back(pair);
    } else if (kind_of(op) == last) {
      until_[pair] = forwards_;
    }
  }
}

bool MemoryChooser::price(Timetable& table, i32 rank, i32 rounds) {
  measure(table, rank);
  Knapsack& k = knapsack_;
  k.capacity = m_.capacity[rank];
  k.begin.clear();
  k.until.clear();
  k.candidate_begin.assign(1, 0);
  k.latency.clear();
  k.memory.clear();
  for (const i32 pair : pairs_) {
    k.begin.push_back(from_[pair]);
    k.until.push_back(until_[pair]);
    const bool frozen = m_.frozen(m_.pair_pass[pair]);
    for (i32 at = m_.level_begin[pair]; at < m_.level_begin[pair + 1]; ++at) {
      const Costs& costs = m_.costs[at];
      k.latency.push_back(costs.forward + (frozen ? 0 : costs.backward + costs.weight));
      k.memory.push_back(costs.memory);
    }
    k.candidate_begin.push_back(static_cast<i32>(k.latency.size()));
  }
  const KnapsackChoice choice = choose_candidates(k, 0, rounds);
  if (!choice.feasible) return false;
  for (std::size_t i = 0; i < pairs_.size(); ++i) table.level[pairs_[i]] = choice.chosen[i];
  return true;
}

void MemoryChooser::raise(Timetable& table, i32 rank, i32 pair) {
  measure(table, rank);
  held_.assign(forwards_ + 1, 0);
  for (const i32 one : pairs_) {
    const i64 bytes = m_.costs[m_.level_begin[one] + table.level[one]].memory;
    held_[from_[one]] += bytes;
    held_[until_[one]] -= bytes;
  }
  for (i32 i = 1; i < forwards_; ++i) held_[i] += held_[i - 1];
  const i32 slot = from_[pair];
  const i64 room = m_.capacity[rank] - held_[slot];
  i32 best = -1;
  double most = 0;
  for (const i32 one : pairs_) {
    if (from_[one] > slot) break;
    if (until_[one] <= slot || table.level[one] + 1 >= m_.levels(one)) continue;
    const Costs& now = m_.costs[m_.level_begin[one] + table.level[one]];
    const Costs& next = m_.costs[m_.level_begin[one] + table.level[one] + 1];
    const i64 more = next.memory - now.memory;
    if (more > room) continue;
    const i64 saved =
        now.forward - next.forward + now.backward - next.backward + now.weight - next.weight;
    const double worth =
        static_cast<double>(saved) / (static_cast<double>(more) * (until_[one] - from_[one]));
    if (worth <= most) continue;
    const auto held = held_.begin();
    if (*std::max_element(held + from_[one], held + until_[one]) + more > m_.capacity[rank]) {
      continue;
    }
    most = worth;
    best = one;
  }
  if (best >= 0) ++table.level[best];
}

bool MemoryChooser::run(Timetable& table, i32 rank, bool keep, Random* noise) {
  measure(table, rank);
  if (!keep) {
    for (const i32 pair : pairs_) table.level[pair] = 0;
  }
  held_.assign(forwards_, 0);
  steps_.clear();
  for (const i32 pair : pairs_) {
    const i32 begin = m_.level_begin[pair];
    const bool frozen = m_.frozen(m_.pair_pass[pair]);
    const i64 bytes = m_.costs[begin + table.level[pair]].memory;
    for (i32 i = from_[pair]; i < until_[pair]; ++i) held_[i] += bytes;
    double worth = 1e300;
    const double share = noise ? 0.85 + 0.3 * noise->unit() : 1;
    for (i32 level = table.level[pair] + 1; level < m_.levels(pair); ++level) {
      const i32 at = begin + level;
      i64 saved = m_.costs[at - 1].forward - m_.costs[at].forward;
      if (!frozen) {
        saved += m_.costs[at - 1].backward + m_.costs[at - 1].weight - m_.costs[at].backward -
                 m_.costs[at].weight;
      }
      const double cost = static_cast<double>(m_.costs[at].memory - m_.costs[at - 1].memory) *
                          static_cast<double>(until_[pair] - from_[pair]);
      worth = std::min(worth, share * static_cast<double>(saved) / cost);
      steps_.push_back({worth, pair, level});
    }
  }
  const i64 capacity = m_.capacity[rank];
  for (const i64 bytes : held_) {
    if (bytes > capacity) return false;
  }
  std::stable_sort(steps_.begin(), steps_.end(),
                   [](const Step& a, const Step& b) { return a.worth > b.worth; });
  for (const Step& step : steps_) {
    const i32 pair = step.pair;
    if (table.level[pair] != step.level - 1) continue;
    const i32 at = m_.level_begin[pair] + step.level;
    const i64 more = m_.costs[at].memory - m_.costs[at - 1].memory;
    i64 most = 0;
    for (i32 i = from_[pair]; i < until_[pair]; ++i) most = std::max(most, held_[i]);
    if (most + more > capacity) continue;
    for (i32 i = from_[pair]; i < until_[pair]; ++i) held_[i] += more;
    table.level[pair] = step.level;
  }
  return true;
}

}  // namespace pipeweaver
