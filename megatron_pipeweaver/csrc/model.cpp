#include "model.hpp"

#include <algorithm>
#include <map>
#include <stdexcept>

namespace pipeweaver {

namespace {

i64 total(const RawProblem& raw, i32 strategy) {
  return raw.forward[strategy] + raw.backward[strategy] + raw.weight[strategy];
}

// The strategies of one stage pair, leanest first, without those that another one beats.
std::vector<i32> pareto(const RawProblem& raw, i32 begin, i32 end, bool frozen) {
  const auto time = [&](i32 s) { return frozen ? raw.forward[s] : total(raw, s); };
  std::vector<i32> order;
  for (i32 s = begin; s < end; ++s) order.push_back(s);
  std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) {
    if (raw.memory[a] != raw.memory[b]) return raw.memory[a] < raw.memory[b];
    return time(a) < time(b);
  });
  std::vector<i32> kept;
  for (const i32 s : order) {
    if (kept.empty() || time(s) < time(kept.back())) kept.push_back(s);
  }
  return kept;
}

}  // namespace

Model::Model(const RawProblem& raw)
    : ranks(raw.ranks),
      microbatches(raw.microbatches),
      passes(static_cast<i32>(raw.pass_stages.size())),
      capacity(raw.capacity),
      pass_microbatch(raw.pass_microbatch),
      pass_module(raw.pass_module),
      pass_sub(raw.pass_sub),
      pass_frozen(raw.pass_frozen),
      pass_latency(raw.pass_latency) {
  if (ranks < 1 || static_cast<i32>(capacity.size()) != ranks) {
    throw std::invalid_argument("capacity needs one entry per rank");
  }
  pass_begin.push_back(0);
  level_begin.push_back(0);
  for (i32 p = 0; p < passes; ++p) {
    for (i32 s = 0; s < raw.pass_stages[p]; ++s) {
      const i32 pair = pass_begin.back() + s;
      pair_pass.push_back(p);
      pair_rank.push_back(s % ranks);
      const i32 begin = raw.strategy_begin.at(pair), end = raw.strategy_begin.at(pair + 1);
      for (const auto* times : {&raw.forward, &raw.backward, &raw.weight}) {
        shortest.push_back(*std::min_element(times->begin() + begin, times->begin() + end));
      }
      for (const i32 at : pareto(raw, begin, end, frozen(p))) {
        strategy.push_back(at - begin);
        costs.push_back(
            {raw.forward.at(at), raw.backward.at(at), raw.weight.at(at), raw.memory.at(at)});
      }
      level_begin.push_back(static_cast<i32>(strategy.size()));
    }
    pass_begin.push_back(pass_begin.back() + raw.pass_stages[p]);
    if (pass_microbatch[p] < 0 || pass_microbatch[p] >= microbatches) {
      throw std::invalid_argument("a pass names a microbatch that is not there");
    }
  }
  pairs = pass_begin.back();

  producers.begin = raw.producer_begin;
  producers.items = raw.producers;
  std::vector<std::vector<i32>> consumers_of(passes), passes_of(microbatches);
  backward_consumers.assign(passes, 0);
  for (i32 p = 0; p < passes; ++p) {
    passes_of[pass_microbatch[p]].push_back(p);
    for (i32 i = producers.begin.at(p); i < producers.begin.at(p + 1); ++i) {
      consumers_of.at(producers.items.at(i)).push_back(p);
      if (!frozen(p)) ++backward_consumers[producers.items[i]];
    }
  }
  for (const auto& list : consumers_of) {
    consumers.items.insert(consumers.items.end(), list.begin(), list.end());
    consumers.close();
  }
  for (const auto& list : passes_of) {
    microbatch_passes.items.insert(microbatch_passes.items.end(), list.begin(), list.end());
    microbatch_passes.close();
  }

  std::map<i32, std::vector<i32>> by_module;
  for (i32 p = 0; p < passes; ++p) {
    if (!frozen(p)) by_module[pass_module[p]].push_back(p);
  }
  before_in_order.assign(passes, -1);
  after_in_order.assign(passes, -1);
  for (auto& [module, list] : by_module) {
    std::stable_sort(list.begin(), list.end(), [&](i32 a, i32 b) {
      if (pass_microbatch[a] != pass_microbatch[b]) return pass_microbatch[a] < pass_microbatch[b];
      return pass_sub[a] < pass_sub[b];
    });
    for (std::size_t i = 1; i < list.size(); ++i) {
      before_in_order[list[i]] = list[i - 1];
      after_in_order[list[i - 1]] = list[i];
    }
  }
}

}  // namespace pipeweaver
