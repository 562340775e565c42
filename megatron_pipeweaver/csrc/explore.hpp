// Exploration of segment priorities: the paper's tree search, and two plain ones to compare with.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "evaluator.hpp"

namespace pipeweaver {

// A sequence of segment groups as priorities. A group is a module's segments of one direction
// within a microbatch; its segments have one priority. Not `grouped`, each segment of each pass is
// a group of its own.
class Segments {
 public:
  Segments(const Model& model, bool grouped);
  i32 count() const { return count_; }
  // Keys from a sequence: the earlier a group stands, the sooner its ops go.
  void keys(const std::vector<i32>& sequence, std::vector<i64>& key) const;

 private:
  const Model& m_;
  std::vector<i32> forward_, backward_;  // per stage pair: its groups
  i32 count_ = 0;
};

// Monte-Carlo tree search over such sequences (paper 4.1); threads share one tree.
class Tree {
 public:
  explicit Tree(i32 groups);
  // Select and expand: the groups fixed so far. `node` takes what was selected.
  std::vector<i32> descend(Random& random, const SearchOptions& options, i32& node);
  // Propagates the best score of the rollouts from `node` to the root.
  void reward(i32 node, double score, i64 rollouts);

 private:
  struct Node {
    i32 group = -1, parent = -1;
    i64 visits = 0;
    double best = 0;
    std::vector<i32> children;
    std::vector<i32> untried;
  };
  i32 add(i32 group, i32 parent, const std::vector<i32>& taken);

  i32 groups_;
  std::vector<Node> nodes_;
  std::mutex mutex_;
};

void explore(const Model& model, Evaluator& evaluator, Random& random, Tree& tree,
             const Policy& base);

}  // namespace pipeweaver
