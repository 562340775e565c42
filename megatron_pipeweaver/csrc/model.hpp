// The scheduling problem as flat arrays. Nothing in the core but this knows what a problem is.
#pragma once

#include <cstdint>
#include <vector>

namespace pipeweaver {

using i64 = std::int64_t;
using i32 = std::int32_t;

enum Kind : i32 { kForward = 0, kBackward = 1, kWeight = 2 };

// An op is 3 * stage pair + kind.
inline i32 op_of(i32 pair, i32 kind) { return 3 * pair + kind; }
inline i32 pair_of(i32 op) { return op / 3; }
inline i32 kind_of(i32 op) { return op % 3; }

// Lists of different lengths behind one another: the items of i are items[begin[i] .. begin[i+1]).
struct Lists {
  std::vector<i32> begin{0};
  std::vector<i32> items;
  void close() { begin.push_back(static_cast<i32>(items.size())); }
};

// What Python hands over.
struct RawProblem {
  i32 ranks = 1;
  i32 microbatches = 0;
  std::vector<i64> capacity;         // per rank, bytes
  std::vector<i32> pass_microbatch;  // per pass; passes of a microbatch stand together
  std::vector<i32> pass_module;
  std::vector<i32> pass_sub;
  std::vector<i32> pass_stages;
  std::vector<i64> pass_latency;
  std::vector<i32> pass_frozen;
  std::vector<i32> producer_begin;  // pass -> passes in its `after`
  std::vector<i32> producers;
  std::vector<i32> strategy_begin;  // stage pair -> strategies
  std::vector<i64> forward;
  std::vector<i64> backward;
  std::vector<i64> weight;
  std::vector<i64> memory;
};

struct Costs {
  i64 forward, backward, weight, memory;
};

// A stage pair's strategies as levels: level 0 is the leanest, each next one needs more memory and
// less time, the last is the fastest. Strategies that another one beats in both are left out.
struct Model {
  i32 ranks = 1;
  i32 microbatches = 0;
  i32 passes = 0;
  i32 pairs = 0;
  std::vector<i64> capacity;

  std::vector<i32> pass_microbatch, pass_module, pass_sub, pass_frozen;
  std::vector<i64> pass_latency;
  std::vector<i32> pass_begin;  // pass -> its first stage pair; passes + 1 entries
  Lists producers, consumers;
  std::vector<i32> backward_consumers;  // consumers that have a backward
  Lists microbatch_passes;

  std::vector<i32> pair_pass, pair_rank;
  std::vector<i32> level_begin;  // stage pair -> its levels; pairs + 1 entries
  std::vector<Costs> costs;      // level -> its times and memory
  // Op -> its least time under any strategy, kept as a level or not.
  std::vector<i64> shortest;
  std::vector<i32> strategy;  // level -> index of the strategy within its stage pair

  // Passes that follow one another at each stage when backwards keep the microbatch order: the
  // previous and next pass of the same module, -1 at the ends.
  std::vector<i32> before_in_order, after_in_order;

  explicit Model(const RawProblem& raw);

  i32 stages(i32 pass) const { return pass_begin[pass + 1] - pass_begin[pass]; }
  i32 stage(i32 pair) const { return pair - pass_begin[pair_pass[pair]]; }
  i32 levels(i32 pair) const { return level_begin[pair + 1] - level_begin[pair]; }
  bool frozen(i32 pass) const { return pass_frozen[pass] != 0; }
  bool enters(i32 pass) const { return producers.begin[pass] == producers.begin[pass + 1]; }
  i64 duration(i32 op, i32 level, bool split) const {
    const Costs& at = costs[level_begin[op / 3] + level];
    switch (op % 3) {
      case kForward:
        return at.forward;
      case kBackward:
        return split ? at.backward : at.backward + at.weight;
      default:
        return at.weight;
    }
  }
  // From the end of `pass`'s last stage to stage 0 of a consumer, and back.
  i64 latency_between(i32 pass) const { return (stages(pass) - 1) % ranks != 0 ? hop(pass) : 0; }
  i64 hop(i32 pass) const { return ranks > 1 ? pass_latency[pass] : 0; }
};

}  // namespace pipeweaver
