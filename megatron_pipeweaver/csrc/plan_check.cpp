// The proof that a plan is safe to run: yes or no. `compiler/verify.py` is the readable twin, in
// the same order, and says what is wrong.
#include <algorithm>
#include <numeric>
#include <tuple>
#include <utility>

#include "plan.hpp"

namespace pipeweaver {
namespace {

using Edge = std::pair<i32, i32>;

class Checker {
 public:
  explicit Checker(const Plan& plan) : plan_(plan) {}

  std::optional<std::vector<i64>> run() {
    const bool safe = graph() && op_places() && stage_pairs() && transfer_places() && messages() &&
                      transfers() && groups() && order() && pair_order() && progress() && memory();
    if (!safe) return std::nullopt;
    return peaks_;
  }

 private:
  i32 passes() const { return static_cast<i32>(plan_.passes.size()); }
  i32 stages(i32 pass) const { return plan_.passes[pass].stages; }
  bool frozen(i32 pass) const { return plan_.passes[pass].frozen || plan_.forward_only; }
  i32 op(i32 kind, i32 pass, i32 stage) const { return op_of(pair_begin_[pass] + stage, kind); }
  i32 op(const NamedOp& one) const { return op(one.kind, one.pass, one.stage); }
  bool known(const NamedOp& one) const { return one.stage < stages(one.pass); }
  i32 rank_of(i32 stage) const { return stage % plan_.ranks; }

  // As many stages as ranks and segments make; no pass twice after another, none after itself.
  bool graph() {
    i64 pairs = 0;
    for (const PlanPass& one : plan_.passes) {
      pair_begin_.push_back(static_cast<i32>(pairs));
      pairs += one.stages;
      if (one.stages != static_cast<i64>(plan_.ranks) * plan_.segments[one.module]) return false;
      if (pairs > kMostPairs) return false;
    }
    pairs_ = static_cast<i32>(pairs);
    consumers_.resize(passes());
    std::vector<i32> waiting(passes()), ready;
    for (i32 p = 0; p < passes(); ++p) {
      std::vector<i32> after = plan_.passes[p].after;
      std::sort(after.begin(), after.end());
      if (std::adjacent_find(after.begin(), after.end()) != after.end()) return false;
      for (const i32 producer : after) consumers_[producer].push_back(p);
      waiting[p] = static_cast<i32>(after.size());
      if (after.empty()) ready.push_back(p);
    }
    i32 done = 0;
    for (; !ready.empty(); ++done) {
      const i32 p = ready.back();
      ready.pop_back();
      for (const i32 consumer : consumers_[p]) {
        if (--waiting[consumer] == 0) ready.push_back(consumer);
      }
    }
    return done == passes();
  }

  // Every op once and on its rank; no forward is missing, and no backward where there is one.
  bool op_places() {
    place_.assign(3 * static_cast<std::size_t>(pairs_), -1);
    compute_.assign(place_.size(), nullptr);
    for (i32 r = 0; r < plan_.ranks; ++r) {
      for (std::size_t i = 0; i < plan_.actions[r].size(); ++i) {
        const PlanAction& action = plan_.actions[r][i];
        if (!is_compute(action.kind)) continue;
        const NamedOp& one = action.op;
        if (!known(one) || action.kind != one.kind || rank_of(one.stage) != r) return false;
        if (frozen(one.pass) && one.kind != kForward) return false;
        if (compute_[op(one)] != nullptr) return false;
        compute_[op(one)] = &action;
        place_[op(one)] = static_cast<i32>(i);
      }
    }
    for (i32 p = 0; p < passes(); ++p) {
      for (i32 s = 0; s < stages(p); ++s) {
        if (place_[op(kForward, p, s)] < 0) return false;
        if (!frozen(p) && place_[op(kBackward, p, s)] < 0) return false;
      }
    }
    return true;
  }

  // Forward, backward and weight gradient of a stage agree on strategy and memory.
  bool stage_pairs() const {
    for (std::size_t o = 0; o < compute_.size(); ++o) {
      if (compute_[o] == nullptr) continue;
      const PlanAction* forward = compute_[op_of(pair_of(static_cast<i32>(o)), kForward)];
      if (compute_[o]->strategy != forward->strategy || compute_[o]->memory != forward->memory) {
        return false;
      }
    }
    return true;
  }

  // Calls `wait(op, data)` for what an op waits for: THE dependency rule, as in `ir/problem.py`.
  template <typename Wait>
  void dependencies(i32 kind, i32 pass, i32 stage, Wait wait) const {
    if (kind == kWeight) {
      wait(NamedOp{kBackward, pass, stage}, false);
    } else if (kind == kForward) {
      if (stage > 0) {
        wait(NamedOp{kForward, pass, stage - 1}, true);
      } else {
        for (const i32 producer : plan_.passes[pass].after) {
          wait(NamedOp{kForward, producer, stages(producer) - 1}, true);
        }
      }
    } else {
      wait(NamedOp{kForward, pass, stage}, false);
      if (stage < stages(pass) - 1) {
        wait(NamedOp{kBackward, pass, stage + 1}, true);
      } else {
        for (const i32 consumer : consumers_[pass]) {
          if (!frozen(consumer)) wait(NamedOp{kBackward, consumer, 0}, true);
        }
      }
    }
  }

  // Calls `visit(target, source, data)` for every dependency of every op of the plan.
  template <typename Visit>
  void all_dependencies(Visit visit) const {
    for (i32 p = 0; p < passes(); ++p) {
      for (i32 s = 0; s < stages(p); ++s) {
        for (i32 kind = kForward; kind <= kWeight; ++kind) {
          const NamedOp target{kind, p, s};
          if (compute_[op(target)] == nullptr) continue;
          dependencies(kind, p, s,
                       [&](const NamedOp& source, bool data) { visit(target, source, data); });
        }
      }
    }
  }

  // Per message, where each of its four transfers stands: once, on its rank.
  bool transfer_places() {
    const auto count = static_cast<i32>(plan_.messages.size());
    for (auto& places : transfer_) places.assign(count, -1);
    for (i32 r = 0; r < plan_.ranks; ++r) {
      for (std::size_t i = 0; i < plan_.actions[r].size(); ++i) {
        const PlanAction& action = plan_.actions[r][i];
        if (is_compute(action.kind)) continue;
        const bool waits = action.kind == kWaitIsend || action.kind == kWaitIrecv;
        const bool sends = action.kind == kIsend || action.kind == kWaitIsend;
        if (action.end == action.begin || (waits && action.end != action.begin + 1)) return false;
        for (i32 m = action.begin; m < action.end; ++m) {
          const i32 number = plan_.moved[m];
          if (number >= count) return false;
          const PlanMessage& message = plan_.messages[number];
          if ((sends ? message.source_rank : message.target_rank) != r) return false;
          i32& place = transfer_[action.kind - kIsend][number];
          if (place >= 0) return false;
          place = static_cast<i32>(i);
        }
      }
    }
    return true;
  }

  // Exactly the messages that the dependencies ask for, with their ranks, shapes and types.
  bool messages() const {
    std::vector<Edge> wanted, found;
    all_dependencies([&](const NamedOp& target, const NamedOp& source, bool data) {
      if (data && rank_of(source.stage) != rank_of(target.stage)) {
        wanted.emplace_back(op(source), op(target));
      }
    });
    std::vector<i32> dtype(plan_.modules.size(), -1);
    for (const PlanMessage& one : plan_.messages) {
      const NamedOp& source = one.source;
      const NamedOp& target = one.target;
      if (!known(source) || !known(target)) return false;
      found.emplace_back(op(source), op(target));
      if (one.source_rank != rank_of(source.stage)) return false;
      if (one.target_rank != rank_of(target.stage)) return false;
      const PlanPass& made = plan_.passes[source.kind == kForward ? source.pass : target.pass];
      const bool within = source.pass == target.pass;
      if (one.shape != (within ? made.hidden_shape : made.output_shape)) return false;
      i32& usual = dtype[made.module];
      if (usual < 0) usual = one.dtype;
      if (usual != one.dtype) return false;
    }
    std::sort(wanted.begin(), wanted.end());
    std::sort(found.begin(), found.end());
    return wanted == found;  // `wanted` has none twice
  }

  i32 placed(i32 kind, i32 message) const { return transfer_[kind - kIsend][message]; }

  // Every message is posted and awaited on both ends, first posted, then awaited.
  bool transfers() const {
    for (std::size_t m = 0; m < plan_.messages.size(); ++m) {
      const auto number = static_cast<i32>(m);
      for (const auto& [post, wait] : {std::pair{kIsend, kWaitIsend}, {kIrecv, kWaitIrecv}}) {
        if (placed(post, number) < 0 || placed(wait, number) < placed(post, number)) return false;
      }
    }
    return true;
  }

  // What one end posts as one, the other end posts as one, of one directed pair, in its order.
  bool groups() const {
    for (i32 r = 0; r < plan_.ranks; ++r) {
      for (const PlanAction& action : plan_.actions[r]) {
        if (is_compute(action.kind) || action.end == action.begin + 1) continue;
        const PlanMessage& first = plan_.messages[plan_.moved[action.begin]];
        for (i32 m = action.begin; m < action.end; ++m) {
          const PlanMessage& one = plan_.messages[plan_.moved[m]];
          if (one.source_rank != first.source_rank || one.target_rank != first.target_rank) {
            return false;
          }
          if (one.sequence - first.sequence != m - action.begin) return false;
        }
        const bool sends = action.kind == kIsend;
        const i32 rank = sends ? first.target_rank : first.source_rank;
        const i32 index = placed(sends ? kIrecv : kIsend, plan_.moved[action.begin]);
        const PlanAction& other = plan_.actions[rank][index];
        if (!std::equal(plan_.moved.begin() + action.begin, plan_.moved.begin() + action.end,
                        plan_.moved.begin() + other.begin, plan_.moved.begin() + other.end)) {
          return false;
        }
      }
    }
    return true;
  }

  // On its rank each op stands behind what it needs, each send behind what it sends.
  bool order() const {
    bool held = true;
    all_dependencies([&](const NamedOp& target, const NamedOp& source, bool) {
      if (rank_of(source.stage) == rank_of(target.stage) && place_[op(source)] > place_[op(target)])
        held = false;
    });
    for (std::size_t m = 0; held && m < plan_.messages.size(); ++m) {
      const auto number = static_cast<i32>(m);
      const PlanMessage& one = plan_.messages[m];
      held = placed(kIsend, number) > place_[op(one.source)] &&
             placed(kWaitIrecv, number) < place_[op(one.target)];
    }
    return held;
  }

  // Both ends of a directed rank pair post its messages in the order of their numbers.
  bool pair_order() const {
    std::vector<i32> by_pair(plan_.messages.size());
    std::iota(by_pair.begin(), by_pair.end(), 0);
    const auto key = [this](i32 number) {
      const PlanMessage& one = plan_.messages[number];
      return std::tuple{one.source_rank, one.target_rank, one.sequence};
    };
    std::sort(by_pair.begin(), by_pair.end(), [&](i32 a, i32 b) { return key(a) < key(b); });
    for (std::size_t i = 0; i < by_pair.size(); ++i) {
      const PlanMessage& one = plan_.messages[by_pair[i]];
      const PlanMessage* before = i == 0 ? nullptr : &plan_.messages[by_pair[i - 1]];
      if (before == nullptr || before->source_rank != one.source_rank ||
          before->target_rank != one.target_rank) {
        if (one.sequence != 0) return false;
        continue;
      }
      if (one.sequence != before->sequence + 1) return false;
      for (const i32 kind : {kIsend, kIrecv}) {
        if (placed(kind, by_pair[i]) < placed(kind, by_pair[i - 1])) return false;
      }
    }
    return true;
  }

  // All ranks run to their ends where each wait needs the other side to have posted.
  bool progress() const {
    std::vector<char> sent(plan_.messages.size(), 0), received(plan_.messages.size(), 0);
    std::vector<std::size_t> next(plan_.ranks, 0);
    bool moved = true;
    while (moved) {
      moved = false;
      for (i32 r = 0; r < plan_.ranks; ++r) {
        const std::vector<PlanAction>& actions = plan_.actions[r];
        const std::size_t start = next[r];
        for (std::size_t& i = next[r]; i < actions.size(); ++i) {
          const PlanAction& action = actions[i];
          if (is_compute(action.kind)) continue;
          if (action.kind == kIsend || action.kind == kIrecv) {
            std::vector<char>& posted = action.kind == kIsend ? sent : received;
            for (i32 m = action.begin; m < action.end; ++m) posted[plan_.moved[m]] = 1;
          } else {
            const std::vector<char>& needed = action.kind == kWaitIsend ? received : sent;
            if (needed[plan_.moved[action.begin]] == 0) break;
          }
        }
        moved = moved || next[r] > start;
      }
    }
    for (i32 r = 0; r < plan_.ranks; ++r) {
      if (next[r] < plan_.actions[r].size()) return false;
    }
    return true;
  }

  // In the order of execution no rank holds more than its capacity.
  bool memory() {
    for (i32 r = 0; r < plan_.ranks; ++r) {
      std::uint64_t held = 0, peak = 0;
      for (const PlanAction& action : plan_.actions[r]) {
        if (!is_compute(action.kind)) continue;
        const NamedOp& one = action.op;
        const auto bytes = static_cast<std::uint64_t>(action.memory);
        bool ends = frozen(one.pass);
        if (one.kind == kForward) {
          held += bytes;
          peak = std::max(peak, held);
          if (held > static_cast<std::uint64_t>(plan_.capacity[r])) return false;
        } else {
          ends = one.kind == kWeight || compute_[op(kWeight, one.pass, one.stage)] == nullptr;
        }
        if (ends) held -= bytes;
      }
      peaks_.push_back(static_cast<i64>(peak));
    }
    return true;
  }

  static constexpr i64 kMostPairs = 1 << 28;

  const Plan& plan_;
  i32 pairs_ = 0;
  std::vector<i32> pair_begin_;               // pass -> its first stage pair
  std::vector<std::vector<i32>> consumers_;   // pass -> passes that come after it
  std::vector<i32> place_;                    // op -> its action on its rank; -1: none
  std::vector<const PlanAction*> compute_;    // op -> its action
  std::array<std::vector<i32>, 4> transfer_;  // kind, message -> its action on its rank
  std::vector<i64> peaks_;
};

}  // namespace

std::optional<std::vector<i64>> check_plan(const Plan& plan) { return Checker(plan).run(); }

}  // namespace pipeweaver
