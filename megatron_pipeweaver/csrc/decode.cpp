#include "decode.hpp"

#include <algorithm>
#include <functional>

namespace pipeweaver {

Decoder::Decoder(const Model& model, const std::vector<Alone>& alone)
    : m_(model), alone_(alone), most_needed_(model.ranks, 0), ranks_(model.ranks) {
  for (const Alone& one : alone_) {
    any_wide_ = any_wide_ || !one.narrow;
    for (i32 r = 0; r < m_.ranks; ++r) most_needed_[r] = std::max(most_needed_[r], one.peak[r]);
  }
}

void Decoder::reset() {
  const i32 microbatches = m_.microbatches;
  for (Rank& rank : ranks_) {
    rank.free = rank.held = 0;
    rank.last_kind = -1;
    rank.freed = 0;
    rank.stale = true;
    for (auto& list : rank.ready) list.clear();
    rank.weights.clear();
  }
  held_.assign(static_cast<std::size_t>(m_.ranks) * microbatches, 0);
  need_.resize(held_.size());
  for (i32 r = 0; r < m_.ranks; ++r) {
    for (i32 k = 0; k < microbatches; ++k) need_[r * microbatches + k] = alone_[k].peak[r];
  }
  flight_.clear();
  place_.assign(microbatches, -1);
  relaxed_.assign(microbatches, 0);
  ops_left_.assign(microbatches, 0);
  to_enter_.assign(microbatches, 0);
  step_.assign(microbatches, 0);
  step_forwards_.assign(microbatches, 0);
  releases_.assign(microbatches, 0);
  forwards_wanted_.resize(m_.passes);
  backwards_wanted_ = m_.backward_consumers;
  forward_arrive_.assign(m_.passes, 0);
  backward_arrive_.assign(m_.passes, 0);
  entered_.assign(m_.passes, 0);
  entering_.clear();
  entering_head_ = 0;
  entering_in_flight_ = 0;
  load_in_flight_ = 0;
  weights_seen_ = 0;
  backward_done_.assign(policy_->in_order ? m_.pairs : 0, 0);
  for (i32 p = 0; p < m_.passes; ++p) {
    const i32 kinds = m_.frozen(p) ? 1 : (policy_->split ? 3 : 2);
    ops_left_[m_.pass_microbatch[p]] += kinds * m_.stages(p);
    forwards_wanted_[p] = m_.producers.begin[p + 1] - m_.producers.begin[p];
    if (m_.enters(p)) {
      entering_.push_back(p);
      ++to_enter_[m_.pass_microbatch[p]];
    }
  }
  std::stable_sort(entering_.begin(), entering_.end(), [&](i32 a, i32 b) {
    if (policy_->in_order && m_.pass_microbatch[a] != m_.pass_microbatch[b]) {
      return m_.pass_microbatch[a] < m_.pass_microbatch[b];
    }
    return policy_->key[op_of(m_.pass_begin[a], kForward)] <
           policy_->key[op_of(m_.pass_begin[b], kForward)];
  });
  out_->makespan = 0;
  out_->split = policy_->split;
  out_->order.resize(m_.ranks);
  for (auto& ops : out_->order) ops.clear();
  out_->start.assign(3 * static_cast<std::size_t>(m_.pairs), 0);
  out_->end.assign(3 * static_cast<std::size_t>(m_.pairs), 0);
  out_->level.assign(m_.pairs, 0);
}

bool Decoder::run(const Policy& policy, Timetable& out) {
  policy_ = &policy;
  out_ = &out;
  reset();
  i64 left = 0;
  for (const i32 ops : ops_left_) left += ops;
  while (left > 0) {
    i32 first = -1;
    i64 least = kNever;
    for (i32 r = 0; r < m_.ranks; ++r) {
      if (ranks_[r].stale) choose(r);
      if (ranks_[r].choice.start < least) {
        least = ranks_[r].choice.start;
        first = r;
      }
    }
    if (first < 0) {
      if (!relax()) return false;
      continue;
    }
    execute(first);
    --left;
  }
  return true;
}

void Decoder::all_stale() {
  for (Rank& rank : ranks_) {
    rank.stale = true;
    ++rank.freed;
  }
}

// Every rank waits for memory. The microbatch that has been in flight longest gives up the levels
// it was meant to have; if none is in flight, the next one to enter does. See interleave.py for
// the proof that this always frees one of its forwards.
bool Decoder::relax() {
  for (const i32 k : flight_) {
    if (!relaxed_[k]) {
      relaxed_[k] = 1;
      all_stale();
      return true;
    }
  }
  if (flight_.empty() && entering_head_ < entering_.size()) {
    const i32 k = m_.pass_microbatch[entering_[entering_head_]];
    if (!relaxed_[k]) {
      relaxed_[k] = 1;
      all_stale();
      return true;
    }
  }
  return false;
}

// Whether every microbatch in flight could still finish, in the order in which they started, if
// `microbatch` held `bytes` more on `rank` and so needed `lean` less.
bool Decoder::safe(i32 rank, i32 microbatch, i64 bytes, i64 lean) const {
  const i64 capacity = m_.capacity[rank];
  const i64 total = ranks_[rank].held + bytes;
  if (total > capacity) return false;
  if (total + most_needed_[rank] <= capacity) return true;
  const i64* held = &held_[static_cast<std::size_t>(rank) * m_.microbatches];
  const i64* need = &need_[static_cast<std::size_t>(rank) * m_.microbatches];
  i64 behind = bytes;  // held by this one and those that started after the one looked at
  i32 at = static_cast<i32>(flight_.size()) - 1;
  if (place_[microbatch] < 0) {
    if (behind + need[microbatch] - lean > capacity) return false;
  } else {
    for (; flight_[at] != microbatch; --at) behind += held[flight_[at]];
  }
  for (; at >= 0; --at) {
    const i32 k = flight_[at];
    behind += held[k];
    if (behind + need[k] - (k == microbatch ? lean : 0) > capacity) return false;
  }
  return true;
}

// A microbatch that is not narrow runs its passes in the one order that is known to fit.
bool Decoder::step_open(i32 pair) const {
  const i32 k = m_.pass_microbatch[m_.pair_pass[pair]];
  const Alone& alone = alone_[k];
  if (alone.narrow) return true;
  const Step& step = alone.steps[step_[k]];
  if (step.pass != m_.pair_pass[pair]) return false;
  if (step.stage >= 0 && step.stage != m_.stage(pair)) return false;
  return releases_[k] >= step.releases;
}

// The level at which the forward of `pair` may start now; -1 if it may not.
i32 Decoder::admit(i32 pair) const {
  const i32 pass = m_.pair_pass[pair];
  const i32 k = m_.pass_microbatch[pass];
  if (any_wide_ && !step_open(pair)) return -1;
  const i32 rank = m_.pair_rank[pair];
  const i32 begin = m_.level_begin[pair];
  const bool enters = pair == m_.pass_begin[pass] && m_.enters(pass);
  const bool lower = relaxed_[k] || (policy_->adaptive && !enters);
  const i64 lean = m_.costs[begin].memory;
  for (i32 level = policy_->level[pair]; level >= 0; --level) {
    const i64 bytes = m_.costs[begin + level].memory;
    if (m_.frozen(pass) ? ranks_[rank].held + bytes <= m_.capacity[rank]
                        : safe(rank, k, bytes, lean)) {
      return level;
    }
    if (!lower) return -1;
  }
  return -1;
}

bool Decoder::order_open(i32 pair) const {
  const i32 pass = m_.pair_pass[pair];
  const i32 before = m_.before_in_order[pass];
  return before < 0 || backward_done_[m_.pass_begin[before] + m_.stage(pair)];
}

namespace {

inline bool better(i64 start, i64 key, i32 pair, i64 than_start, i64 than_key, i32 than_pair) {
  if (start != than_start) return start < than_start;
  if (key != than_key) return key < than_key;
  return pair < than_pair;
}

}  // namespace

void Decoder::choose(i32 rank) {
  Rank& state = ranks_[rank];
  state.stale = false;
  state.forward = state.backward = Choice{};
  for (const i32 kind : {kForward, kBackward}) {
    const Choice& best = kind == kForward ? state.forward : state.backward;
    const i32 waiting = static_cast<i32>(state.ready[kind].size());
    // Behind one that can start at once there is nothing better: keys rise.
    for (i32 index = 0; index < waiting && best.start > state.free; ++index) {
      offer(state, kind, index);
    }
  }
  if (rank == 0) choose_entering(state.forward);
  decide(state);
}

// The op at `index` of those that are ready becomes the best of its kind where it is better and may
// start.
void Decoder::offer(Rank& state, i32 kind, i32 index) {
  Ready& item = state.ready[kind][index];
  Choice& best = kind == kForward ? state.forward : state.backward;
  const i64 start = std::max(item.arrive, state.free);
  if (!better(start, item.key, item.pair, best.start, best.key, best.pair)) return;
  i32 level = 0;
  if (kind == kForward) {
    // What was refused stays refused until memory is freed: a forward that starts takes at least
    // what its microbatch needs less afterwards.
    if (item.refused == state.freed) return;
    level = admit(item.pair);
    if (level < 0) {
      item.refused = state.freed;
      return;
    }
  } else if (policy_->in_order && !order_open(item.pair)) {
    return;
  }
  best = {start, item.key, item.pair, kind, level, index};
}

// What the rank runs next: the best forward, the best backward, or a weight gradient.
void Decoder::decide(Rank& state) const {
  Choice forward = state.forward, backward = state.backward;
  choose_weight(state, forward, backward);
  const bool both = forward.start != kNever && forward.start == backward.start;
  bool take_forward =
      better(forward.start, forward.key, forward.pair, backward.start, backward.key, backward.pair);
  if (policy_->alternate && both && forward.kind == kForward && backward.kind == kBackward) {
    take_forward = state.last_kind == kBackward;
  }
  state.choice = take_forward ? forward : backward;
  if (policy_->hold > 0) choose_held(state, state.choice);
}

// The passes without producers enter in the order of their keys. Where the next one may not, one
// of a microbatch that is in flight may go before it: those have to be able to finish.
void Decoder::choose_entering(Choice& best) {
  while (entering_head_ < entering_.size() && entered_[entering_[entering_head_]]) {
    ++entering_head_;
  }
  if (entering_head_ == entering_.size()) return;
  i32 head = entering_[entering_head_];
  const i32 k = m_.pass_microbatch[head];
  if (!alone_[k].narrow && place_[k] < 0) head = alone_[k].steps[0].pass;
  if (offer_entering(head, best)) return;
  if (entering_in_flight_ == 0) return;
  for (std::size_t i = entering_head_ + 1; i < entering_.size(); ++i) {
    const i32 pass = entering_[i];
    if (entered_[pass] || place_[m_.pass_microbatch[pass]] < 0) continue;
    if (offer_entering(pass, best)) return;
  }
}

// Whether `pass` may enter; if so, it becomes `best` where it is better.
bool Decoder::offer_entering(i32 pass, Choice& best) {
  const i32 k = m_.pass_microbatch[pass];
  if (place_[k] < 0 && !flight_.empty() &&
      load_in_flight_ + policy_->load[k] > policy_->load_limit) {
    return false;
  }
  const i32 pair = m_.pass_begin[pass];
  const i32 level = admit(pair);
  if (level < 0) return false;
  const i64 start = std::max(ranks_[0].free, policy_->release[k]);
  const i64 key = policy_->key[op_of(pair, kForward)];
  if (better(start, key, pair, best.start, best.key, best.pair)) {
    best = {start, key, pair, kForward, level, -1};
  }
  return true;
}

// A weight gradient runs where its key is the least, or in a gap.
void Decoder::choose_weight(const Rank& state, Choice& forward, Choice& backward) const {
  if (state.weights.empty()) return;
  const auto [key, pair] = state.weights.front();
  const i64 next = std::min(forward.start, backward.start);
  if (next != kNever && next > state.free && policy_->patience > 0) {
    const i64 length = m_.costs[m_.level_begin[pair] + out_->level[pair]].weight;
    if ((next - state.free) * 256 < policy_->patience * length) return;
  }
  const Choice weight{state.free, key, pair, kWeight, 0, -1};
  if (better(state.free, key, pair, forward.start, forward.key, forward.pair) &&
      better(state.free, key, pair, backward.start, backward.key, backward.pair)) {
    forward = weight;
    backward = Choice{};
  }
}

// Something of a lesser key is known to arrive soon: the rank waits for it.
void Decoder::choose_held(const Rank& state, Choice& best) const {
  if (best.start == kNever) return;
  const i64 from = best.start, until = best.start + policy_->hold;
  bool held = false;  // only ops that arrive later tie-break among themselves
  for (const i32 kind : {kForward, kBackward}) {
    const std::vector<Ready>& list = state.ready[kind];
    for (i32 index = 0; index < static_cast<i32>(list.size()); ++index) {
      const Ready& item = list[index];
      if (item.arrive > until || item.arrive <= from || item.key > best.key) continue;
      if (item.key == best.key &&
          (!held || !better(item.arrive, 0, item.pair, best.start, 0, best.pair))) {
        continue;
      }
      i32 level = 0;
      if (kind == kBackward) {
        if (policy_->in_order && !order_open(item.pair)) continue;
      } else {
        level = admit(item.pair);
        if (level < 0) continue;
      }
      best = {item.arrive, item.key, item.pair, kind, level, index};
      held = true;
    }
  }
}

void Decoder::execute(i32 rank) {
  Rank& state = ranks_[rank];
  const Choice choice = state.choice;
  const i32 pair = choice.pair;
  const i32 pass = m_.pair_pass[pair];
  const i32 k = m_.pass_microbatch[pass];
  if (choice.kind == kForward) {
    out_->level[pair] = choice.level;
    ++executed;
  } else if (choice.kind == kBackward) {
    ++executed;
  }
  const i32 op = op_of(pair, choice.kind);
  const i64 end = choice.start + m_.duration(op, out_->level[pair], policy_->split);
  out_->start[op] = choice.start;
  out_->end[op] = end;
  out_->order[rank].push_back(op);
  out_->makespan = std::max(out_->makespan, end);
  state.free = end;
  state.stale = true;
  if (choice.kind == kWeight) {
    std::pop_heap(state.weights.begin(), state.weights.end(), std::greater<>());
    state.weights.pop_back();
    release(pair);
  } else {
    state.last_kind = choice.kind;
    if (choice.kind == kForward && pair == m_.pass_begin[pass] && m_.enters(pass)) {
      if (place_[k] < 0) begin_microbatch(k);
      entered_[pass] = 1;
      --to_enter_[k];
      --entering_in_flight_;
    } else {
      std::vector<Ready>& list = state.ready[choice.kind];
      list.erase(list.begin() + choice.index);
    }
    if (choice.kind == kForward) {
      finish_forward(pair, end);
    } else {
      finish_backward(pair, end);
    }
  }
  if (--ops_left_[k] == 0) retire(k);
}

void Decoder::begin_microbatch(i32 microbatch) {
  place_[microbatch] = static_cast<i32>(flight_.size());
  flight_.push_back(microbatch);
  entering_in_flight_ += to_enter_[microbatch];
  load_in_flight_ += policy_->load[microbatch];
}

void Decoder::retire(i32 microbatch) {
  flight_.erase(flight_.begin() + place_[microbatch]);
  place_[microbatch] = -1;
  for (std::size_t i = 0; i < flight_.size(); ++i) place_[flight_[i]] = static_cast<i32>(i);
  load_in_flight_ -= policy_->load[microbatch];
  all_stale();
}

void Decoder::arrive(i32 pair, i32 kind, i64 time) {
  Rank& state = ranks_[m_.pair_rank[pair]];
  std::vector<Ready>& list = state.ready[kind];
  const Ready item{time, policy_->key[op_of(pair, kind)], pair};
  std::size_t at = list.size();
  while (at > 0 && std::pair(list[at - 1].key, list[at - 1].pair) > std::pair(item.key, pair)) --at;
  list.insert(list.begin() + static_cast<std::ptrdiff_t>(at), item);
  if (state.stale) return;
  // All else is as it was when the rank chose.
  const i32 index = static_cast<i32>(at);
  Choice& best = kind == kForward ? state.forward : state.backward;
  if (best.index >= index) ++best.index;
  offer(state, kind, index);
  decide(state);
}

void Decoder::finish_forward(i32 pair, i64 end) {
  const i32 pass = m_.pair_pass[pair];
  const i32 k = m_.pass_microbatch[pass];
  const i32 rank = m_.pair_rank[pair];
  if (!m_.frozen(pass)) {
    const i32 begin = m_.level_begin[pair];
    const i64 bytes = m_.costs[begin + out_->level[pair]].memory;
    const std::size_t at = static_cast<std::size_t>(rank) * m_.microbatches + k;
    ranks_[rank].held += bytes;
    held_[at] += bytes;
    need_[at] -= m_.costs[begin].memory;
  }
  if (any_wide_ && !alone_[k].narrow) {
    const Step& step = alone_[k].steps[step_[k]];
    const i32 wanted = step.stage < 0 ? m_.stages(pass) : 1;
    if (++step_forwards_[k] == wanted) {
      step_forwards_[k] = 0;
      ++step_[k];
    }
    all_stale();
  }
  if (pair + 1 < m_.pass_begin[pass + 1]) {
    arrive(pair + 1, kForward, end + m_.hop(pass));
    return;
  }
  const i64 reach = end + m_.latency_between(pass);
  for (i32 i = m_.consumers.begin[pass]; i < m_.consumers.begin[pass + 1]; ++i) {
    const i32 consumer = m_.consumers.items[i];
    forward_arrive_[consumer] = std::max(forward_arrive_[consumer], reach);
    if (--forwards_wanted_[consumer] == 0) {
      arrive(m_.pass_begin[consumer], kForward, forward_arrive_[consumer]);
    }
  }
  if (!m_.frozen(pass) && m_.backward_consumers[pass] == 0) arrive(pair, kBackward, end);
}

void Decoder::finish_backward(i32 pair, i64 end) {
  const i32 pass = m_.pair_pass[pair];
  if (policy_->in_order) {
    backward_done_[pair] = 1;
    ranks_[m_.pair_rank[pair]].stale = true;
  }
  if (policy_->split) {
    std::vector<std::pair<i64, i32>>& weights = ranks_[m_.pair_rank[pair]].weights;
    weights.push_back(
        {policy_->in_order ? weights_seen_++ : policy_->key[op_of(pair, kWeight)], pair});
    std::push_heap(weights.begin(), weights.end(), std::greater<>());
  } else {
    release(pair);
  }
  if (pair > m_.pass_begin[pass]) {
    arrive(pair - 1, kBackward, end + m_.hop(pass));
    return;
  }
  for (i32 i = m_.producers.begin[pass]; i < m_.producers.begin[pass + 1]; ++i) {
    const i32 producer = m_.producers.items[i];
    if (m_.frozen(producer)) continue;
    const i64 reach = end + m_.latency_between(producer);
    backward_arrive_[producer] = std::max(backward_arrive_[producer], reach);
    if (--backwards_wanted_[producer] == 0) {
      arrive(m_.pass_begin[producer + 1] - 1, kBackward, backward_arrive_[producer]);
    }
  }
}

void Decoder::release(i32 pair) {
  const i32 pass = m_.pair_pass[pair];
  const i32 k = m_.pass_microbatch[pass];
  const i32 rank = m_.pair_rank[pair];
  const i32 begin = m_.level_begin[pair];
  const i64 bytes = m_.costs[begin + out_->level[pair]].memory;
  const std::size_t at = static_cast<std::size_t>(rank) * m_.microbatches + k;
  ranks_[rank].held -= bytes;
  ++ranks_[rank].freed;
  held_[at] -= bytes;
  if (any_wide_ && !alone_[k].narrow) {
    need_[at] += m_.costs[begin].memory;
    ++releases_[k];
    all_stale();
  }
}

}  // namespace pipeweaver
