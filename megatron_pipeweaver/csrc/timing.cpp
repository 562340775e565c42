#include "timing.hpp"

#include <algorithm>

namespace pipeweaver {

Timer::Timer(const Model& model) : m_(model), next_(model.ranks) {
  // Waits within a rank's order (own forward, own backward) count too: an order may break them.
  waits_all_.assign(3 * static_cast<std::size_t>(m_.pairs), 0);
  for (i32 pass = 0; pass < m_.passes; ++pass) {
    const i32 first = m_.pass_begin[pass], last = m_.pass_begin[pass + 1] - 1;
    for (i32 pair = first; pair <= last; ++pair) {
      waits_all_[op_of(pair, kForward)] =
          pair > first ? 1 : m_.producers.begin[pass + 1] - m_.producers.begin[pass];
      waits_all_[op_of(pair, kBackward)] = 1 + (pair < last ? 1 : m_.backward_consumers[pass]);
      waits_all_[op_of(pair, kWeight)] = 1;
    }
  }
}

bool Timer::run(Timetable& table) {
  waits_ = waits_all_;
  ready_.assign(waits_.size(), 0);
  std::fill(next_.begin(), next_.end(), 0);
  queue_.clear();
  for (i32 r = m_.ranks - 1; r >= 0; --r) queue_.push_back(r);
  std::size_t left = 0;
  for (const auto& ops : table.order) left += ops.size();
  table.makespan = 0;
  std::vector<i64> free(m_.ranks, 0);
  const auto tell = [&](i32 op, i64 time) {
    ready_[op] = std::max(ready_[op], time);
    if (--waits_[op] > 0) return;
    const i32 rank = m_.pair_rank[pair_of(op)];
    if (next_[rank] < table.order[rank].size() && table.order[rank][next_[rank]] == op) {
      queue_.push_back(rank);
    }
  };
  while (!queue_.empty()) {
    const i32 rank = queue_.back();
    queue_.pop_back();
    const std::vector<i32>& ops = table.order[rank];
    while (next_[rank] < ops.size() && waits_[ops[next_[rank]]] == 0) {
      const i32 op = ops[next_[rank]++];
      const i32 pair = pair_of(op), pass = m_.pair_pass[pair];
      const i64 start = std::max(free[rank], ready_[op]);
      const i64 end = start + m_.duration(op, table.level[pair], table.split);
      table.start[op] = start;
      table.end[op] = end;
      free[rank] = end;
      --left;
      table.makespan = std::max(table.makespan, end);
      if (kind_of(op) == kForward) {
        if (!m_.frozen(pass)) tell(op_of(pair, kBackward), end);
        if (pair + 1 < m_.pass_begin[pass + 1]) {
          tell(op_of(pair + 1, kForward), end + m_.hop(pass));
          continue;
        }
        const i64 reach = end + m_.latency_between(pass);
        for (i32 i = m_.consumers.begin[pass]; i < m_.consumers.begin[pass + 1]; ++i) {
          tell(op_of(m_.pass_begin[m_.consumers.items[i]], kForward), reach);
        }
      } else if (kind_of(op) == kBackward) {
        if (table.split) tell(op_of(pair, kWeight), end);
        if (pair > m_.pass_begin[pass]) {
          tell(op_of(pair - 1, kBackward), end + m_.hop(pass));
          continue;
        }
        for (i32 i = m_.producers.begin[pass]; i < m_.producers.begin[pass + 1]; ++i) {
          const i32 producer = m_.producers.items[i];
          if (m_.frozen(producer)) continue;
          tell(op_of(m_.pass_begin[producer + 1] - 1, kBackward),
               end + m_.latency_between(producer));
        }
      }
    }
  }
  return left == 0;
}

void Timer::latest(const Timetable& table, std::vector<i64>& latest) {
  // Backwards in time; of ops that start at one instant, those that end later come first, and
  // instantaneous ones keep the order of their chain by the order of recording below.
  merged_.clear();
  for (const auto& ops : table.order) merged_.insert(merged_.end(), ops.begin(), ops.end());
  std::stable_sort(merged_.begin(), merged_.end(), [&](i32 a, i32 b) {
    if (table.start[a] != table.start[b]) return table.start[a] > table.start[b];
    return table.end[a] > table.end[b];
  });
  latest.assign(table.start.size(), table.makespan);  // first the latest end, then the start
  std::vector<i32> behind(table.start.size(), -1);
  for (const auto& ops : table.order) {
    for (std::size_t i = 1; i < ops.size(); ++i) behind[ops[i]] = ops[i - 1];
  }
  const auto before = [&](i32 op, i64 time) { latest[op] = std::min(latest[op], time); };
  for (const i32 op : merged_) {
    const i32 pair = pair_of(op), pass = m_.pair_pass[pair];
    latest[op] -= m_.duration(op, table.level[pair], table.split);
    const i64 start = latest[op];
    if (behind[op] >= 0) before(behind[op], start);
    if (kind_of(op) == kForward) {
      if (pair > m_.pass_begin[pass]) {
        before(op_of(pair - 1, kForward), start - m_.hop(pass));
        continue;
      }
      for (i32 i = m_.producers.begin[pass]; i < m_.producers.begin[pass + 1]; ++i) {
        const i32 producer = m_.producers.items[i];
        before(op_of(m_.pass_begin[producer + 1] - 1, kForward),
               start - m_.latency_between(producer));
      }
    } else if (kind_of(op) == kBackward) {
      before(op_of(pair, kForward), start);
      if (pair + 1 < m_.pass_begin[pass + 1]) {
        before(op_of(pair + 1, kBackward), start - m_.hop(pass));
        continue;
      }
      for (i32 i = m_.consumers.begin[pass]; i < m_.consumers.begin[pass + 1]; ++i) {
        const i32 consumer = m_.consumers.items[i];
        if (m_.frozen(consumer)) continue;
        before(op_of(m_.pass_begin[consumer], kBackward), start - m_.latency_between(pass));
      }
    } else {
      before(op_of(pair, kBackward), start);
    }
  }
}

std::vector<i64> peak_memory(const Model& model, const Timetable& table) {
  std::vector<i64> peaks(model.ranks, 0);
  for (i32 r = 0; r < model.ranks; ++r) {
    i64 held = 0, now = 0;
    const auto change = [&](i64 time, i64 bytes) {
      if (time > now) peaks[r] = std::max(peaks[r], held);
      now = time;
      held += bytes;
    };
    for (const i32 op : table.order[r]) {
      const i32 pair = pair_of(op);
      const i64 bytes = model.costs[model.level_begin[pair] + table.level[pair]].memory;
      if (kind_of(op) == kForward) {
        change(table.start[op], bytes);
        if (model.frozen(model.pair_pass[pair])) change(table.end[op], -bytes);
      } else if (kind_of(op) == (table.split ? kWeight : kBackward)) {
        change(table.end[op], -bytes);
      }
    }
  }
  return peaks;
}

}  // namespace pipeweaver
