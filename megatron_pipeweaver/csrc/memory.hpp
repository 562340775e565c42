// The choice of strategies for fixed orders (paper 4.3): which stage pairs may keep more memory.
#pragma once

#include <vector>

#include "decode.hpp"
#include "knapsack.hpp"
#include "model.hpp"
#include "random.hpp"

namespace pipeweaver {

class MemoryChooser {
 public:
  explicit MemoryChooser(const Model& model);

  // Sets the levels of rank `rank`'s stage pairs: from the leanest, faster levels in the order of
  // time saved per byte and per forward that passes while they are held, as long as they fit.
  // `keep` starts from the levels that `table` has; `noise` disturbs the order a little. False if
  // even the levels at the start do not fit.
  bool run(Timetable& table, i32 rank, bool keep, Random* noise = nullptr);
  // Chooses the levels of `rank` anew with prices (`knapsack.hpp`), in so many rounds.
  bool price(Timetable& table, i32 rank, i32 rounds);
  // Where the forward of `pair` leaves room, one of those held then gets its next faster level.
  void raise(Timetable& table, i32 rank, i32 pair);

 private:
  void measure(const Timetable& table, i32 rank);

  struct Step {
    double worth;
    i32 pair;
    i32 level;
  };

  const Model& m_;
  std::vector<i32> from_, until_;  // per stage pair: forwards of its rank that it spans
  std::vector<i64> held_;          // per forward of the rank
  std::vector<Step> steps_;
  std::vector<i32> pairs_;
  i32 forwards_ = 0;
  Knapsack knapsack_;
};

}  // namespace pipeweaver
