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
  Heads heads{m.shortest, std::vector<i64>(count, 0), std::vector<i64>(count, 0)};
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

namespace {

// Per stage pair: the least time between the end of its forward and the start of its backward,
// along its own pass and the passes whose backward it waits for.
std::vector<i64> gaps(const Model& m, const std::vector<i64>& shortest) {
  std::vector<i64> gap(m.pairs, 0), turn(m.passes, -1);
  std::vector<i32> todo;
  for (i32 p = 0; p < m.passes; ++p) todo.push_back(p);
  while (!todo.empty()) {
    const i32 pass = todo.back();
    if (turn[pass] >= 0) {
      todo.pop_back();
      continue;
    }
    i64 longest = 0;
    bool known = true;
    for (i32 i = m.consumers.begin[pass]; i < m.consumers.begin[pass + 1]; ++i) {
      const i32 consumer = m.consumers.items[i];
      if (m.frozen(consumer)) continue;
      if (turn[consumer] < 0) {
        todo.push_back(consumer);
        known = false;
        continue;
      }
      const i32 first = m.pass_begin[consumer];
      const i64 inside =
          shortest[op_of(first, kForward)] + gap[first] + shortest[op_of(first, kBackward)];
      longest = std::max(longest, inside + 2 * m.latency_between(pass));
    }
    if (!known) continue;
    todo.pop_back();
    turn[pass] = longest;
    for (i32 u = m.pass_begin[pass + 1] - 1; u >= m.pass_begin[pass]; --u) {
      gap[u] = longest;
      longest += shortest[op_of(u, kForward)] + shortest[op_of(u, kBackward)] + 2 * m.hop(pass);
    }
  }
  return gap;
}

struct Saving {
  double area, time;  // per unit of time saved: more memory x residence
};

// The fractional choice of strategies of one rank: the leanest area, the time it takes, and what
// more area saves, best first (the lower convex hull of each stage pair's strategies).
struct Trade {
  double area = 0, time = 0;
  std::vector<Saving> savings;
};

Trade trade_of(const Model& m, i32 rank, const std::vector<i64>& gap) {
  Trade trade;
  for (i32 u = 0; u < m.pairs; ++u) {
    if (m.pair_rank[u] != rank) continue;
    const bool frozen = m.frozen(m.pair_pass[u]);
    std::vector<std::pair<double, double>> points;  // (area, time)
    for (i32 at = m.level_begin[u]; at < m.level_begin[u + 1]; ++at) {
      const Costs& costs = m.costs[at];
      const double busy =
          static_cast<double>(costs.forward + (frozen ? 0 : costs.backward + costs.weight));
      const double held = busy + (frozen ? 0.0 : static_cast<double>(gap[u]));
      points.emplace_back(static_cast<double>(costs.memory) * held, busy);
    }
    std::sort(points.begin(), points.end());
    std::vector<std::pair<double, double>> hull;
    for (const auto& point : points) {
      if (!hull.empty() && point.second >= hull.back().second) continue;
      while (hull.size() > 1) {
        const auto& a = hull[hull.size() - 2];
        const auto& b = hull.back();
        const double turn = (b.first - a.first) * (point.second - a.second) -
                            (b.second - a.second) * (point.first - a.first);
        if (turn > 0) break;
        hull.pop_back();
      }
      hull.push_back(point);
    }
    trade.area += hull[0].first;
    trade.time += hull[0].second;
    for (std::size_t i = 1; i < hull.size(); ++i) {
      trade.savings.push_back(
          {hull[i].first - hull[i - 1].first, hull[i - 1].second - hull[i].second});
    }
  }
  std::sort(trade.savings.begin(), trade.savings.end(),
            [](const Saving& a, const Saving& b) { return a.time * b.area > b.time * a.area; });
  return trade;
}

// The least time a rank works when its memory x residence is at most `area`.
double least_work(const Trade& trade, double area) {
  double left = area - trade.area, time = trade.time;
  for (const Saving& saving : trade.savings) {
    if (left <= 0) break;
    const double part = saving.area <= left ? 1 : left / saving.area;
    time -= part * saving.time;
    left -= part * saving.area;
  }
  return time;
}

i64 time_memory_bound(const Model& m, i32 rank, const Heads& heads, const std::vector<i64>& gap) {
  const Trade trade = trade_of(m, rank, gap);
  i64 head = -1, tail = -1;
  for (i32 op = 0; op < 3 * m.pairs; ++op) {
    if (m.pair_rank[pair_of(op)] != rank || !exists(m, op)) continue;
    if (head < 0 || heads.head[op] < head) head = heads.head[op];
    if (tail < 0 || heads.tail[op] < tail) tail = heads.tail[op];
  }
  if (head < 0) return 0;
  const double around = static_cast<double>(head + tail);
  const double capacity = static_cast<double>(m.capacity[rank]);
  // A makespan T is ruled out if the rank cannot do its work within it. What is ruled out is an
  // interval from 0, found by halving; a millionth is given away to rounding.
  double low = 0, high = trade.time + around;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    const double needed = least_work(trade, capacity * middle) + around;
    const bool too_little = trade.area > capacity * middle * (1 + 1e-9);
    (needed > middle || too_little ? low : high) = middle;
    if (high - low < 0.25) break;
  }
  return static_cast<i64>(low * (1 - 1e-6));
}

}  // namespace

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
  const std::vector<i64> gap = gaps(m, heads.shortest);
  for (i32 r = 0; r < m.ranks; ++r) {
    bounds.time_memory.push_back(time_memory_bound(m, r, heads, gap));
  }
  return bounds;
}

}  // namespace pipeweaver
