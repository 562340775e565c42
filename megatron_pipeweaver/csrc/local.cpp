#include "local.hpp"

#include <algorithm>
#include <cmath>

namespace pipeweaver {

namespace {

constexpr i32 kPriceRounds = 80;
constexpr i64 kMeasureEvery = 8;  // accepted moves between measurements of slack and critical path

}  // namespace

Retimer::Retimer(const Model& model)
    : m_(model),
      start_(3 * static_cast<std::size_t>(model.pairs)),
      end_(start_.size()),
      way_(start_.size(), 0),
      slack_(start_.size(), 0),
      seen_(start_.size(), 0),
      waiter_(start_.size(), -1),
      waiter_next_(model.ranks, -1),
      next_(model.ranks),
      first_(model.ranks),
      free_(model.ranks) {
  const auto wait = [&](i32 op, i64 latency) {
    wait_op_.push_back(op);
    wait_latency_.push_back(latency);
  };
  wait_begin_.push_back(0);
  for (i32 pair = 0; pair < m_.pairs; ++pair) {
    const i32 pass = m_.pair_pass[pair];
    if (pair > m_.pass_begin[pass]) {
      wait(op_of(pair - 1, kForward), m_.hop(pass));
    } else {
      for (i32 i = m_.producers.begin[pass]; i < m_.producers.begin[pass + 1]; ++i) {
        const i32 producer = m_.producers.items[i];
        wait(op_of(m_.pass_begin[producer + 1] - 1, kForward), m_.latency_between(producer));
      }
    }
    wait_begin_.push_back(static_cast<i32>(wait_op_.size()));
    wait(op_of(pair, kForward), 0);
    if (pair + 1 < m_.pass_begin[pass + 1]) {
      wait(op_of(pair + 1, kBackward), m_.hop(pass));
    } else {
      for (i32 i = m_.consumers.begin[pass]; i < m_.consumers.begin[pass + 1]; ++i) {
        const i32 consumer = m_.consumers.items[i];
        if (m_.frozen(consumer)) continue;
        wait(op_of(m_.pass_begin[consumer], kBackward), m_.latency_between(pass));
      }
    }
    wait_begin_.push_back(static_cast<i32>(wait_op_.size()));
    wait(op_of(pair, kBackward), 0);
    wait_begin_.push_back(static_cast<i32>(wait_op_.size()));
  }
  follow_begin_.assign(start_.size() + 1, 0);
  for (const i32 op : wait_op_) ++follow_begin_[op + 1];
  for (std::size_t i = 1; i < follow_begin_.size(); ++i) follow_begin_[i] += follow_begin_[i - 1];
  follow_op_.resize(wait_op_.size());
  follow_latency_.resize(wait_op_.size());
  std::vector<i32> at = follow_begin_;
  for (i32 op = 0; op < 3 * m_.pairs; ++op) {
    for (i32 i = wait_begin_[op]; i < wait_begin_[op + 1]; ++i) {
      follow_op_[at[wait_op_[i]]] = op;
      follow_latency_[at[wait_op_[i]]++] = wait_latency_[i];
    }
  }
}

// Runs `rank` until an op has to wait for one whose time is not known yet, or all are done.
bool Retimer::advance(const Timetable& table, i32 rank, i64 from) {
  const std::vector<i32>& ops = table.order[rank];
  std::size_t at = next_[rank];
  i64 free = free_[rank];
  for (; at < ops.size(); ++at) {
    const i32 op = ops[at];
    i64 ready = free;
    for (i32 i = wait_begin_[op]; i < wait_begin_[op + 1]; ++i) {
      const i32 other = wait_op_[i];
      if (seen_[other] == run_) {
        ready = std::max(ready, end_[other] + wait_latency_[i]);
      } else if (table.start[other] < from) {
        ready = std::max(ready, table.end[other] + wait_latency_[i]);
      } else {
        waiter_next_[rank] = waiter_[other];
        waiter_[other] = rank;
        next_[rank] = at;
        free_[rank] = free;
        return false;
      }
    }
    if (ready - table.start[op] > slack_[op] + grace_ && table.start[op] > settled_) {
      late_ = true;
      return false;
    }
    start_[op] = ready;
    free = ready + m_.duration(op, table.level[pair_of(op)], table.split);
    end_[op] = free;
    seen_[op] = run_;
    while (waiter_[op] >= 0) {
      const i32 woken = waiter_[op];
      waiter_[op] = waiter_next_[woken];
      todo_.push_back(woken);
    }
  }
  next_[rank] = at;
  free_[rank] = free;
  return true;
}

bool Retimer::run(const Timetable& table, i64 from) { return run(table, from, kNever, 0); }

void Retimer::forget_waiters(const Timetable& table) {
  for (i32 r = 0; r < m_.ranks; ++r) {
    if (next_[r] == table.order[r].size()) continue;
    const i32 op = table.order[r][next_[r]];
    for (i32 i = wait_begin_[op]; i < wait_begin_[op + 1]; ++i) waiter_[wait_op_[i]] = -1;
  }
}

bool Retimer::run(const Timetable& table, i64 from, i64 settled, double grace) {
  ++run_;
  late_ = false;
  settled_ = settled;
  grace_ = static_cast<i64>(grace);
  todo_.clear();
  for (i32 r = m_.ranks - 1; r >= 0; --r) {
    const std::vector<i32>& ops = table.order[r];
    // A rank's starts rise along its old order; a changed order differs only from `from` on.
    first_[r] = static_cast<std::size_t>(
        std::partition_point(ops.begin(), ops.end(),
                             [&](i32 op) { return table.start[op] < from; }) -
        ops.begin());
    next_[r] = first_[r];
    free_[r] = first_[r] > 0 ? table.end[ops[first_[r] - 1]] : 0;
    todo_.push_back(r);
  }
  i32 done = 0;
  while (!todo_.empty() && !late_) {
    const i32 rank = todo_.back();
    todo_.pop_back();
    if (advance(table, rank, from)) ++done;
  }
  if (done < m_.ranks) {
    forget_waiters(table);
    return false;
  }
  makespan_ = 0;
  double ends = 0;
  for (i32 r = 0; r < m_.ranks; ++r) {
    makespan_ = std::max(makespan_, free_[r]);
    ends += static_cast<double>(free_[r]);
  }
  cost_ = static_cast<double>(makespan_) + 0.1 * ends / m_.ranks;
  return true;
}

void Retimer::keep(Timetable& table) const {
  for (i32 r = 0; r < m_.ranks; ++r) {
    for (std::size_t i = first_[r]; i < table.order[r].size(); ++i) {
      const i32 op = table.order[r][i];
      table.start[op] = start_[op];
      table.end[op] = end_[op];
    }
  }
  table.makespan = makespan_;
}

// Runs `rank` backwards until an op is followed by one whose way is not known yet.
bool Retimer::retreat(const Timetable& table, i32 rank) {
  const std::vector<i32>& ops = table.order[rank];
  std::size_t left = next_[rank];
  for (; left > 0; --left) {
    const i32 op = ops[left - 1];
    i64 way = free_[rank];
    for (i32 i = follow_begin_[op]; i < follow_begin_[op + 1]; ++i) {
      const i32 other = follow_op_[i];
      if (kind_of(other) == kWeight && !table.split) continue;
      if (kind_of(other) == kBackward && m_.frozen(m_.pair_pass[pair_of(other)])) continue;
      if (seen_[other] != run_) {
        waiter_next_[rank] = waiter_[other];
        waiter_[other] = rank;
        next_[rank] = left;
        return false;
      }
      way = std::max(way, way_[other] + follow_latency_[i]);
    }
    way_[op] = free_[rank] = way + table.end[op] - table.start[op];
    seen_[op] = run_;
    while (waiter_[op] >= 0) {
      const i32 woken = waiter_[op];
      waiter_[op] = waiter_next_[woken];
      todo_.push_back(woken);
    }
  }
  next_[rank] = 0;
  return true;
}

void Retimer::measure_slack(const Timetable& table) {
  ++run_;
  todo_.clear();
  for (i32 r = 0; r < m_.ranks; ++r) {
    next_[r] = table.order[r].size();
    free_[r] = 0;
    todo_.push_back(r);
  }
  while (!todo_.empty()) {
    const i32 rank = todo_.back();
    todo_.pop_back();
    retreat(table, rank);
  }
  for (const auto& ops : table.order) {
    for (const i32 op : ops) slack_[op] = table.makespan - table.start[op] - way_[op];
  }
}

void Retimer::critical(const Timetable& table, std::vector<i32>& path) const {
  path.clear();
  std::vector<std::size_t> place(m_.ranks);
  i32 at = -1;
  for (const auto& ops : table.order) {
    if (!ops.empty() && table.end[ops.back()] == table.makespan) at = ops.back();
  }
  for (i32 r = 0; r < m_.ranks; ++r) place[r] = table.order[r].size();
  while (at >= 0) {
    path.push_back(at);
    const i32 rank = m_.pair_rank[pair_of(at)];
    const std::vector<i32>& ops = table.order[rank];
    while (ops[place[rank] - 1] != at) --place[rank];
    const i64 start = table.start[at];
    i32 before = -1;
    if (place[rank] > 1 && table.end[ops[place[rank] - 2]] == start) before = ops[place[rank] - 2];
    for (i32 i = wait_begin_[at]; before < 0 && i < wait_begin_[at + 1]; ++i) {
      if (table.end[wait_op_[i]] + wait_latency_[i] == start) before = wait_op_[i];
    }
    at = before;
  }
}

LocalSearch::LocalSearch(const Model& model, Evaluator& evaluator, Random& random)
    : m_(model),
      evaluator_(evaluator),
      random_(random),
      retimer_(model),
      chooser_(model),
      place_(3 * static_cast<std::size_t>(model.pairs), 0) {}

void LocalSearch::run(Timetable& table, i64 moves, double warmth) {
  std::size_t ops = 0;
  double work = 0;
  for (const auto& list : table.order) {
    ops += list.size();
    for (const i32 op : list) work += static_cast<double>(table.end[op] - table.start[op]);
  }
  if (ops < 2 || !retimer_.run(table, 0)) return;
  retimer_.keep(table);
  retimer_.measure_slack(table);
  evaluator_.offer(table);
  for (i32 r = 0; r < m_.ranks; ++r) {
    for (std::size_t i = 0; i < table.order[r].size(); ++i) {
      place_[table.order[r][i]] = static_cast<i32>(i);
    }
  }
  retimer_.critical(table, path_);
  double cost = retimer_.cost(), best_cost = cost;
  Timetable best = table;
  i64 accepted = 0;
  const double hot = warmth * work / static_cast<double>(ops);
  const double begin = evaluator_.progress();
  for (i64 tried = 0; tried < moves && !evaluator_.over(); ++tried) {
    const double now = evaluator_.progress();
    const double done = std::max(static_cast<double>(tried) / static_cast<double>(moves),
                                 (now - begin) / std::max(1e-9, 1 - begin));
    evaluator_.count();
    if (!move(table)) continue;
    const double heat = hot * std::pow(0.02, done);
    const double limit = cost - heat * std::log(std::max(random_.unit(), 1e-12));
    if (!retimer_.run(table, from_, settled_, limit - cost) || retimer_.cost() > limit) {
      undo(table);
      continue;
    }
    retimer_.keep(table);
    cost = retimer_.cost();
    const std::vector<i32>& order = table.order[rank_];
    for (std::size_t i = 0; i < order.size(); ++i) place_[order[i]] = static_cast<i32>(i);
    if (++accepted % kMeasureEvery == 0) {
      retimer_.measure_slack(table);
      retimer_.critical(table, path_);
    }
    evaluator_.offer(table);
    if (cost < best_cost) {
      best_cost = cost;
      best = table;
    }
  }
  table = std::move(best);
}

bool LocalSearch::move(Timetable& table) {
  const i64 kind = random_.below(16);
  if (kind < 7) return swap_critical(table);
  if (kind < 11) return relocate(table);
  if (kind < 15) return change_level(table);
  return choose_again(table);
}

// Whether `later` may run before `earlier`, both on one rank: not what its dependencies forbid at
// once, nor in deterministic mode two backwards of one stage.
bool LocalSearch::may_pass(i32 earlier, i32 later) const {
  const i32 a = pair_of(earlier), b = pair_of(later);
  if (a == b) return false;
  if (!evaluator_.options().in_order || kind_of(earlier) == kForward ||
      kind_of(earlier) != kind_of(later)) {
    return true;
  }
  return m_.pass_module[m_.pair_pass[a]] != m_.pass_module[m_.pair_pass[b]] ||
         m_.stage(a) != m_.stage(b);
}

bool LocalSearch::fits(const Timetable& table, i32 rank) const {
  const i32 last = table.split ? kWeight : kBackward;
  i64 held = 0;
  for (const i32 op : table.order[rank]) {
    const i32 pair = pair_of(op), kind = kind_of(op);
    if (kind == kForward) {
      const i64 bytes = m_.costs[m_.level_begin[pair] + table.level[pair]].memory;
      if (held + bytes > m_.capacity[rank]) return false;
      if (!m_.frozen(m_.pair_pass[pair])) held += bytes;
    } else if (kind == last) {
      held -= m_.costs[m_.level_begin[pair] + table.level[pair]].memory;
    }
  }
  return true;
}

void LocalSearch::remember(const Timetable& table, i32 rank, i64 from) {
  rank_ = rank;
  from_ = settled_ = from;
  old_order_ = table.order[rank];
  old_level_.clear();
  for (const i32 op : old_order_) {
    if (kind_of(op) == kForward) old_level_.push_back(table.level[pair_of(op)]);
  }
}

void LocalSearch::undo(Timetable& table) {
  table.order[rank_] = old_order_;
  std::size_t at = 0;
  for (const i32 op : old_order_) {
    if (kind_of(op) == kForward) table.level[pair_of(op)] = old_level_[at++];
  }
}

// Times change from the first forward on whose level is another one; what starts behind the last
// op of such a pair is behind all changes.
void LocalSearch::find_changes(const Timetable& table) {
  std::size_t at = 0;
  for (const i32 op : old_order_) {
    if (kind_of(op) != kForward) continue;
    const i32 pair = pair_of(op);
    if (table.level[pair] == old_level_[at++]) continue;
    from_ = std::min(from_, table.start[op]);
    settled_ = std::max(settled_, table.start[op]);
    if (m_.frozen(m_.pair_pass[pair])) continue;
    settled_ = std::max(settled_, table.start[op_of(pair, table.split ? kWeight : kBackward)]);
  }
}

// Two neighbours on a rank change places; the later one stands on the critical path.
bool LocalSearch::swap_critical(Timetable& table) {
  const i32 op = path_[random_.below(static_cast<i64>(path_.size()))];
  const i32 rank = m_.pair_rank[pair_of(op)];
  std::vector<i32>& order = table.order[rank];
  const i32 at = place_[op];
  if (at == 0 || !may_pass(order[at - 1], op)) return false;
  remember(table, rank, table.start[order[at - 1]]);
  settled_ = table.start[op];
  std::swap(order[at - 1], order[at]);
  if (fits(table, rank)) {
    if (kind_of(order[at]) == kForward) {
      chooser_.raise(table, rank, pair_of(order[at]));
      find_changes(table);
    }
    return true;
  }
  undo(table);
  return false;
}

// An op goes some places forwards or backwards, as far as it may pass the others.
bool LocalSearch::relocate(Timetable& table) {
  i32 op = path_[random_.below(static_cast<i64>(path_.size()))];
  if (random_.below(2) == 0) {
    const std::vector<i32>& any = table.order[random_.below(m_.ranks)];
    if (any.empty()) return false;
    op = any[random_.below(static_cast<i64>(any.size()))];
  }
  const i32 rank = m_.pair_rank[pair_of(op)];
  std::vector<i32>& order = table.order[rank];
  const i32 from = place_[op];
  const bool earlier = random_.below(2) == 0;
  const i64 reach = 1 + random_.below(8);
  i32 to = from;
  for (i64 step = 0; step < reach; ++step) {
    const i32 next = earlier ? to - 1 : to + 1;
    if (next < 0 || next >= static_cast<i32>(order.size())) break;
    if (!(earlier ? may_pass(order[next], op) : may_pass(op, order[next]))) break;
    to = next;
  }
  if (to == from) return false;
  remember(table, rank, table.start[order[std::min(from, to)]]);
  settled_ = table.start[order[std::max(from, to)]];
  if (to < from) {
    std::rotate(order.begin() + to, order.begin() + from, order.begin() + from + 1);
  } else {
    std::rotate(order.begin() + from, order.begin() + from + 1, order.begin() + to + 1);
  }
  if (fits(table, rank)) return true;
  undo(table);
  return false;
}

bool LocalSearch::change_level(Timetable& table) {
  i32 op = path_[random_.below(static_cast<i64>(path_.size()))];
  const i32 pair = pair_of(op), rank = m_.pair_rank[pair];
  const i32 level = table.level[pair] + (random_.below(4) == 0 ? -1 : 1);
  if (level < 0 || level >= m_.levels(pair)) return false;
  remember(table, rank, table.start[op_of(pair, kForward)]);
  table.level[pair] = level;
  if (fits(table, rank)) {
    find_changes(table);
    return true;
  }
  // One that overlaps it makes room.
  const std::vector<i32>& order = table.order[rank];
  for (i32 again = 0; again < 3; ++again) {
    const i64 at = place_[op_of(pair, kForward)] + random_.below(25) - 12;
    if (at < 0 || at >= static_cast<i64>(order.size())) continue;
    const i32 other = pair_of(order[at]);
    if (other == pair || table.level[other] == 0) continue;
    --table.level[other];
    if (fits(table, rank)) {
      find_changes(table);
      return true;
    }
  }
  undo(table);
  return false;
}

bool LocalSearch::choose_again(Timetable& table) {
  const i32 rank = m_.pair_rank[pair_of(path_[random_.below(static_cast<i64>(path_.size()))])];
  remember(table, rank, kNever);
  settled_ = 0;
  const bool priced = random_.below(8) == 0;
  if (priced ? chooser_.price(table, rank, kPriceRounds)
             : chooser_.run(table, rank, false, &random_)) {
    find_changes(table);
    return from_ < kNever;
  }
  undo(table);
  return false;
}

}  // namespace pipeweaver
