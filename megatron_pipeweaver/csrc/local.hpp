// Local search among orders: what each rank runs, in which order, at which levels.
//
// A rank's memory depends on its own order and levels alone, and a ring of waits shows when the
// times are computed; so every neighbour that fits and has no ring is a valid schedule, also those
// that admission would call unsafe or that make a rank wait for what is not there yet. Moves change
// one rank: two neighbours on a critical path change places (the neighbourhood of E. Nowicki and
// C. Smutnicki, "A fast taboo search algorithm for the job shop problem", 1996, within blocks too,
// since memory can gain from that), an op goes to another place, a level changes, or all levels of
// the rank are chosen anew with some noise. Times are computed again from the first change on.
#pragma once

#include <vector>

#include "evaluator.hpp"
#include "memory.hpp"
#include "model.hpp"
#include "random.hpp"

namespace pipeweaver {

// Times of fixed orders, computed again from a moment on; the change is kept or dropped.
class Retimer {
 public:
  explicit Retimer(const Model& model);

  // Computes the times of `table` from `from` (ns) on, where its orders, levels or both differ
  // from those that its times belong to; what started before must be as it was. False if ops wait
  // in a ring. `table` itself keeps its old times until `keep`.
  bool run(const Timetable& table, i64 from);
  // The same, and gives up when an op that stood after `settled` (ns), behind all that changed,
  // now starts later by more than `grace` and the slack that it had when that was last measured.
  bool run(const Timetable& table, i64 from, i64 settled, double grace);
  void keep(Timetable& table) const;
  // Measures by how much every op could start later; `table` as `keep` left it.
  void measure_slack(const Timetable& table);

  i64 makespan() const { return makespan_; }
  double cost() const { return cost_; }
  // An op's start and end after the last `run`.
  i64 start(const Timetable& table, i32 op) const;
  // Ops of one critical path of `table`, last first.
  void critical(const Timetable& table, std::vector<i32>& path) const;

 private:
  bool advance(const Timetable& table, i32 rank, i64 from);
  bool retreat(const Timetable& table, i32 rank);
  void forget_waiters(const Timetable& table);

  const Model& m_;
  std::vector<i32> wait_begin_;  // op -> what it waits for
  std::vector<i32> wait_op_;
  std::vector<i64> wait_latency_;
  std::vector<i32> follow_begin_;  // op -> what waits for it
  std::vector<i32> follow_op_;
  std::vector<i64> follow_latency_;
  std::vector<i64> start_, end_;
  std::vector<i64> way_;     // op -> from its start to the end of all
  std::vector<i64> slack_;   // op -> when measured last
  std::vector<i32> seen_;    // op -> the run in which its times were computed
  std::vector<i32> waiter_;  // op -> first rank that waits for it, -1
  std::vector<i32> waiter_next_, todo_;
  std::vector<std::size_t> next_, first_;
  std::vector<i64> free_;
  i32 run_ = 0;
  i64 settled_ = kNever;
  i64 grace_ = 0;
  bool late_ = false;
  i64 makespan_ = 0;
  double cost_ = 0;
};

class LocalSearch {
 public:
  LocalSearch(const Model& model, Evaluator& evaluator, Random& random);

  // Anneals from `table` until the time is up or as many moves were tried as `moves`. It starts at
  // a temperature of `warmth` times the mean length of an op.
  void run(Timetable& table, i64 moves, double warmth);

 private:
  bool move(Timetable& table);
  bool swap_critical(Timetable& table);
  bool relocate(Timetable& table);
  bool change_level(Timetable& table);
  bool choose_again(Timetable& table);
  bool fits(const Timetable& table, i32 rank) const;
  bool may_pass(i32 earlier, i32 later) const;
  void remember(const Timetable& table, i32 rank, i64 from);
  void undo(Timetable& table);
  void find_changes(const Timetable& table);

  const Model& m_;
  Evaluator& evaluator_;
  Random& random_;
  Retimer retimer_;
  MemoryChooser chooser_;
  std::vector<i32> path_;
  std::vector<i32> place_;  // per op: its index in its rank's order
  // The rank that the last move changed, and what it was.
  i32 rank_ = 0;
  i64 from_ = 0, settled_ = 0;
  std::vector<i32> old_order_;
  std::vector<i32> old_level_;
};

}  // namespace pipeweaver
