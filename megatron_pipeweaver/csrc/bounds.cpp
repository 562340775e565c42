#include "bounds.hpp"

#include <algorithm>
#include <queue>
#include <utility>

namespace pipeweaver {

namespace {

struct Edge {
  i32 to;
  i64 latency;
};

// Who waits for `op`: the one dependency rule (`ir.problem.dependencies`), turned round.
template <typename Visit>
void successors(const Model& m, i32 op, Visit visit) {
  const i32 pair = pair_of(op), pass = m.pair_pass[pair];
  if (kind_of(op) == kForward) {
    if (!m.frozen(pass)) visit(Edge{op_of(pair, kBackward), 0});
    if (pair + 1 < m.pass_begin[pass + 1]) {
      visit(Edge{op_of(pair + 1, kForward), m.hop(pass)});
      return;
    }
    for (i32 i = m.consumers.begin[pass]; i < m.consumers.begin[pass + 1]; ++i) {
      visit(Edge{op_of(m.pass_begin[m.consumers.items[i]], kForward), m.latency_between(pass)});
    }
  } else if (kind_of(op) == kBackward) {
    visit(Edge{op_of(pair, kWeight), 0});
    if (pair > m.pass_begin[pass]) {
      visit(Edge{op_of(pair - 1, kBackward), m.hop(pass)});
      return;
    }
    for (i32 i = m.producers.begin[pass]; i < m.producers.begin[pass + 1]; ++i) {
      const i32 producer = m.producers.items[i];
      if (!m.frozen(producer)) {
        visit(Edge{op_of(m.pass_begin[producer + 1] - 1, kBackward), m.latency_between(producer)});
      }
    }
  }
}

bool exists(const Model& m, i32 op) {
  return kind_of(op) == kForward || !m.frozen(m.pair_pass[pair_of(op)]);
}

}  // namespace

Heads heads_and_tails(const Model& m) {
  const std::size_t count = 3 * static_cast<std::size_t>(m.pairs);
  Heads heads{std::vector<i64>(count, 0), std::vector<i64>(count, 0), std::vector<i64>(count, 0)};
  for (i32 pair = 0; pair < m.pairs; ++pair) {
    for (i32 kind = 0; kind < 3; ++kind) {
      i64 least = m.duration(op_of(pair, kind), 0, true);
      for (i32 level = 1; level < m.levels(pair); ++level) {
        least = std::min(least, m.duration(op_of(pair, kind), level, true));
      }
      heads.shortest[op_of(pair, kind)] = least;
    }
  }
  std::vector<i32> waits(count, 0), order;
  for (i32 op = 0; op < static_cast<i32>(count); ++op) {
    if (exists(m, op)) successors(m, op, [&](Edge edge) { ++waits[edge.to]; });
  }
  for (i32 op = 0; op < static_cast<i32>(count); ++op) {
    if (exists(m, op) && waits[op] == 0) order.push_back(op);
  }
  for (std::size_t at = 0; at < order.size(); ++at) {
    const i32 op = order[at];
    const i64 end = heads.head[op] + heads.shortest[op];
    successors(m, op, [&](Edge edge) {
      heads.head[edge.to] = std::max(heads.head[edge.to], end + edge.latency);
      if (--waits[edge.to] == 0) order.push_back(edge.to);
    });
  }
  for (std::size_t at = order.size(); at-- > 0;) {
    successors(m, order[at], [&](Edge edge) {
      heads.tail[order[at]] = std::max(
          heads.tail[order[at]], edge.latency + heads.shortest[edge.to] + heads.tail[edge.to]);
    });
  }
  return heads;
}

Bounds lower_bounds(const Model& m) {
  const Heads heads = heads_and_tails(m);
  Bounds bounds;
  bounds.jackson.assign(m.ranks, 0);
  std::vector<std::vector<i32>> jobs(m.ranks);
  for (i32 op = 0; op < 3 * m.pairs; ++op) {
    if (!exists(m, op)) continue;
    jobs[m.pair_rank[pair_of(op)]].push_back(op);
    bounds.critical_path =
        std::max(bounds.critical_path, heads.head[op] + heads.shortest[op] + heads.tail[op]);
  }
  for (i32 r = 0; r < m.ranks; ++r) {
    std::sort(jobs[r].begin(), jobs[r].end(), [&](i32 a, i32 b) {
      return std::pair(heads.head[a], a) < std::pair(heads.head[b], b);
    });
    std::priority_queue<std::pair<i64, i64>> open;  // (tail, time left)
    i64 now = 0;
    std::size_t next = 0;
    while (next < jobs[r].size() || !open.empty()) {
      if (open.empty()) now = std::max(now, heads.head[jobs[r][next]]);
      for (; next < jobs[r].size() && heads.head[jobs[r][next]] <= now; ++next) {
        open.push({heads.tail[jobs[r][next]], heads.shortest[jobs[r][next]]});
      }
      auto [tail, left] = open.top();
      open.pop();
      const i64 until = next < jobs[r].size() ? heads.head[jobs[r][next]] : now + left;
      const i64 ran = std::min(left, until - now);
      now += ran;
      if (ran < left) {
        open.push({tail, left - ran});
      } else {
        bounds.jackson[r] = std::max(bounds.jackson[r], now + tail);
      }
    }
  }
  return bounds;
}

}  // namespace pipeweaver
