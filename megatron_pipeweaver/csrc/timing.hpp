// Fixed orders in, times out: the longest path through the ranks' orders and the dependencies.
#pragma once

#include <vector>

#include "decode.hpp"
#include "model.hpp"

namespace pipeweaver {

class Timer {
 public:
  explicit Timer(const Model& model);

  // Sets `start`, `end` and `makespan` of `table` from its `order` and `level`, every op as early
  // as it can; false if the orders wait for one another in a ring.
  bool run(Timetable& table);

  // Per op of `table`, the latest start that keeps its orders and its makespan; `table` must be
  // as `run` or the decoder left it.
  void latest(const Timetable& table, std::vector<i64>& start);

 private:
  const Model& m_;
  std::vector<i32> merged_;
  std::vector<i64> ready_;      // per op: when all that it waits for elsewhere is there
  std::vector<i32> waits_;      // per op: how many of those are missing
  std::vector<i32> waits_all_;  // per op, before anything ran
  std::vector<std::size_t> next_;
  std::vector<i32> queue_;
};

// The most memory each rank holds when `table` runs. What is taken and given back at one instant is
// not held: intervals are half open, as in `ir.timeline`.
std::vector<i64> peak_memory(const Model& model, const Timetable& table);

}  // namespace pipeweaver
