#include "alone.hpp"

#include <algorithm>
#include <set>

namespace pipeweaver {

namespace {

constexpr std::size_t kMostStates = 200000;

// Depth-first search over the orders of forwards; backwards run as soon as they may, since they
// only give memory back. Two orders of the same forwards leave the same memory, so a set of
// forwards is entered once.
class OrderSearch {
 public:
  OrderSearch(const Model& model, i32 microbatch, bool in_order)
      : m_(model), in_order_(in_order), held_(model.ranks, 0) {
    const i32 begin = m_.microbatch_passes.begin[microbatch];
    const i32 end = m_.microbatch_passes.begin[microbatch + 1];
    passes_.assign(m_.microbatch_passes.items.begin() + begin,
                   m_.microbatch_passes.items.begin() + end);
    for (const i32 p : passes_) {
      const i32 count = m_.frozen(p) ? m_.stages(p) : 1;
      for (i32 s = 0; s < count; ++s) nodes_.push_back({p, m_.frozen(p) ? s : -1});
    }
    forward_done_.assign(m_.passes, 0);
    backward_done_.assign(m_.passes, 0);
    node_done_.assign(nodes_.size(), false);
  }

  bool run() { return descend(0); }
  bool gave_up() const { return seen_.size() >= kMostStates; }
  std::vector<Step> steps;
  i32 short_rank = -1;
  i64 short_bytes = 0;

 private:
  struct Node {
    i32 pass, stage;
  };

  bool available(const Node& node) const {
    if (node.stage > 0) return forward_done_[node.pass] == node.stage;
    for (i32 i = m_.producers.begin[node.pass]; i < m_.producers.begin[node.pass + 1]; ++i) {
      const i32 producer = m_.producers.items[i];
      if (forward_done_[producer] < m_.stages(producer)) return false;
    }
    return true;
  }

  i64 need(const Node& node, i32 rank) const {
    i64 bytes = 0;
    const i32 first = node.stage < 0 ? 0 : node.stage;
    const i32 last = node.stage < 0 ? m_.stages(node.pass) : node.stage + 1;
    for (i32 s = first; s < last; ++s) {
      const i32 pair = m_.pass_begin[node.pass] + s;
      if (m_.pair_rank[pair] == rank) bytes += m_.costs[m_.level_begin[pair]].memory;
    }
    return bytes;
  }

  bool fits(const Node& node) {
    for (i32 r = 0; r < m_.ranks; ++r) {
      const i64 bytes = held_[r] + need(node, r);
      if (bytes > m_.capacity[r]) {
        if (short_rank < 0 || (r == short_rank && bytes < short_bytes)) {
          short_rank = r;
          short_bytes = bytes;
        }
        return false;
      }
    }
    return true;
  }

  bool backward_available(i32 pass) const {
    if (m_.frozen(pass) || backward_done_[pass] || forward_done_[pass] < m_.stages(pass)) {
      return false;
    }
    if (in_order_) {
      const i32 before = m_.before_in_order[pass];
      if (before >= 0 && m_.pass_microbatch[before] == m_.pass_microbatch[pass] &&
          !backward_done_[before]) {
        return false;
      }
    }
    for (i32 i = m_.consumers.begin[pass]; i < m_.consumers.begin[pass + 1]; ++i) {
      const i32 consumer = m_.consumers.items[i];
      if (!m_.frozen(consumer) && !backward_done_[consumer]) return false;
    }
    return true;
  }

  void add(i32 pass, i32 sign) {
    for (i32 r = 0; r < m_.ranks; ++r) held_[r] += sign * need({pass, -1}, r);
  }

  // Runs every backward that may run; the passes that did.
  std::vector<i32> release() {
    std::vector<i32> done;
    for (bool again = true; again;) {
      again = false;
      for (const i32 p : passes_) {
        if (!backward_available(p)) continue;
        backward_done_[p] = 1;
        add(p, -1);
        releases_ += m_.stages(p);
        done.push_back(p);
        again = true;
      }
    }
    return done;
  }

  bool descend(std::size_t depth) {
    if (depth == nodes_.size()) return true;
    if (gave_up() || !seen_.insert(node_done_).second) return false;
    for (std::size_t n = 0; n < nodes_.size(); ++n) {
      if (node_done_[n] || !available(nodes_[n]) || !fits(nodes_[n])) continue;
      const std::vector<i64> before = held_;
      const i32 pass = nodes_[n].pass;
      steps.push_back({pass, nodes_[n].stage, releases_});
      node_done_[n] = true;
      forward_done_[pass] += m_.frozen(pass) ? 1 : m_.stages(pass);
      if (!m_.frozen(pass)) add(pass, +1);
      const std::vector<i32> freed = release();
      if (descend(depth + 1)) return true;
      bool lossless = true;  // nothing more is held than before: no other order can do better
      for (i32 r = 0; r < m_.ranks; ++r) lossless = lossless && held_[r] <= before[r];
      for (const i32 p : freed) {
        backward_done_[p] = 0;
        releases_ -= m_.stages(p);
      }
      held_ = before;
      forward_done_[pass] -= m_.frozen(pass) ? 1 : m_.stages(pass);
      node_done_[n] = false;
      steps.pop_back();
      if (lossless) return false;
    }
    return false;
  }

  const Model& m_;
  bool in_order_;
  std::vector<i32> passes_;
  std::vector<Node> nodes_;
  std::vector<i64> held_;
  std::vector<i32> forward_done_, backward_done_;
  std::vector<bool> node_done_;
  std::set<std::vector<bool>> seen_;
  i32 releases_ = 0;
};

}  // namespace

Alone run_alone(const Model& model, i32 microbatch, bool in_order) {
  Alone result;
  result.peak.assign(model.ranks, 0);
  std::vector<i64> transient(model.ranks, 0);
  for (i32 i = model.microbatch_passes.begin[microbatch];
       i < model.microbatch_passes.begin[microbatch + 1]; ++i) {
    const i32 pass = model.microbatch_passes.items[i];
    for (i32 pair = model.pass_begin[pass]; pair < model.pass_begin[pass + 1]; ++pair) {
      const i64 bytes = model.costs[model.level_begin[pair]].memory;
      const i32 rank = model.pair_rank[pair];
      if (model.frozen(pass)) {
        transient[rank] = std::max(transient[rank], bytes);
      } else {
        result.peak[rank] += bytes;
      }
    }
  }
  for (i32 r = 0; r < model.ranks; ++r) {
    result.peak[r] += transient[r];
    result.narrow = result.narrow && result.peak[r] <= model.capacity[r];
  }
  if (result.narrow) return result;
  OrderSearch search(model, microbatch, in_order);
  result.feasible = search.run();
  result.decided = result.feasible || !search.gave_up();
  result.rank = search.short_rank;
  result.bytes = search.short_bytes;
  result.steps = search.steps;
  result.peak = model.capacity;
  return result;
}

}  // namespace pipeweaver
