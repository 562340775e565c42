#include "explore.hpp"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <utility>

namespace pipeweaver {

namespace {

constexpr i64 kRollouts = 10;

void shuffle(std::vector<i32>& list, std::size_t from, Random& random) {
  for (std::size_t i = list.size(); i > from + 1; --i) {
    std::swap(list[i - 1], list[from + random.below(static_cast<i64>(i - from))]);
  }
}

}  // namespace

Segments::Segments(const Model& model, bool grouped)
    : m_(model), forward_(model.pairs), backward_(model.pairs, -1) {
  std::map<std::pair<i32, i32>, std::pair<i32, i32>> groups;
  for (i32 u = 0; u < m_.pairs; ++u) {
    const i32 p = m_.pair_pass[u];
    const auto [at, fresh] =
        groups.try_emplace(grouped ? std::pair{m_.pass_microbatch[p], m_.pass_module[p]}
                                   : std::pair{p, m_.stage(u) / m_.ranks},
                           std::pair{-1, -1});
    if (fresh) at->second.first = count_++;
    if (!m_.frozen(p) && at->second.second < 0) at->second.second = count_++;
    forward_[u] = at->second.first;
    backward_[u] = at->second.second;
  }
}

void Segments::keys(const std::vector<i32>& sequence, std::vector<i64>& key) const {
  std::vector<i64> place(count_, 0);
  for (std::size_t i = 0; i < sequence.size(); ++i) place[sequence[i]] = static_cast<i64>(i);
  for (i32 u = 0; u < m_.pairs; ++u) {
    key[op_of(u, kForward)] = place[forward_[u]];
    if (m_.frozen(m_.pair_pass[u])) continue;
    key[op_of(u, kBackward)] = place[backward_[u]];
    key[op_of(u, kWeight)] = count_ + place[backward_[u]];
  }
}

Tree::Tree(i32 groups) : groups_(groups) { add(-1, -1, {}); }

i32 Tree::add(i32 group, i32 parent, const std::vector<i32>& taken) {
  Node node;
  node.group = group;
  node.parent = parent;
  std::vector<char> used(groups_, 0);
  for (const i32 one : taken) used[one] = 1;
  for (i32 one = 0; one < groups_; ++one) {
    if (!used[one]) node.untried.push_back(one);
  }
  nodes_.push_back(std::move(node));
  return static_cast<i32>(nodes_.size()) - 1;
}

std::vector<i32> Tree::descend(Random& random, const SearchOptions& options, i32& node) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<i32> taken;
  node = 0;
  while (nodes_[node].untried.empty() && !nodes_[node].children.empty()) {
    const double log_visits = std::log(static_cast<double>(nodes_[node].visits + 1));
    i32 pick = -1;
    double most = -1;
    for (const i32 child : nodes_[node].children) {
      const double visits = static_cast<double>(nodes_[child].visits + 1);
      const double score = std::pow(nodes_[child].best, options.tree_alpha) +
                           options.tree_beta * std::sqrt(log_visits / visits);
      if (score > most) {
        most = score;
        pick = child;
      }
    }
    node = pick;
    taken.push_back(nodes_[node].group);
  }
  if (!nodes_[node].untried.empty()) {
    std::vector<i32>& untried = nodes_[node].untried;
    const i64 at = random.below(static_cast<i64>(untried.size()));
    const i32 group = untried[at];
    untried[at] = untried.back();
    untried.pop_back();
    taken.push_back(group);
    const i32 child = add(group, node, taken);
    nodes_[node].children.push_back(child);
    node = child;
  }
  return taken;
}

void Tree::reward(i32 node, double score, i64 rollouts) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (; node >= 0; node = nodes_[node].parent) {
    nodes_[node].visits += rollouts;
    nodes_[node].best = std::max(nodes_[node].best, score);
  }
}

void explore(const Model& model, Evaluator& evaluator, Random& random, Tree& tree,
             const Policy& base) {
  const Segments segments(model, evaluator.options().grouped);
  const auto kind = static_cast<Exploration>(evaluator.options().exploration);
  Policy policy = base;
  policy.alternate = evaluator.options().alternate;
  Timetable table;
  double reference = 0;
  const auto score = [&](const std::vector<i32>& sequence) {
    segments.keys(sequence, policy.key);
    const double found = std::max(1.0, evaluator.run(policy, table, kNever));
    if (reference == 0) reference = found;
    return reference / found;
  };
  std::vector<i32> sequence(segments.count());
  std::iota(sequence.begin(), sequence.end(), 0);
  score(sequence);
  while (!evaluator.over()) {
    if (kind == Exploration::kDepthFirst) {
      if (!std::next_permutation(sequence.begin(), sequence.end())) return;
      score(sequence);
    } else if (kind == Exploration::kRandom) {
      shuffle(sequence, 0, random);
      score(sequence);
    } else {
      i32 node = 0;
      const std::vector<i32> taken = tree.descend(random, evaluator.options(), node);
      std::vector<char> used(segments.count(), 0);
      std::vector<i32> full = taken;
      for (const i32 group : taken) used[group] = 1;
      for (i32 group = 0; group < segments.count(); ++group) {
        if (!used[group]) full.push_back(group);
      }
      double best = 0;
      i64 done = 0;
      for (; done < kRollouts && !evaluator.over(); ++done) {
        shuffle(full, taken.size(), random);
        best = std::max(best, score(full));
      }
      tree.reward(node, best, std::max<i64>(1, done));
    }
  }
}

}  // namespace pipeweaver
