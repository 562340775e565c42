#include "evaluator.hpp"

#include <algorithm>

namespace pipeweaver {

Evaluator::Evaluator(const Model& model, const std::vector<Alone>& alone,
                     const SearchOptions& options, Shared& shared, i32 thread)
    : m_(model),
      options_(options),
      shared_(shared),
      thread_(thread),
      decoder_(model, alone),
      timer_(model),
      chooser_(model) {}

i64 Evaluator::elapsed() const {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - shared_.begin).count();
}

bool Evaluator::over() const {
  if (options_.stop && options_.stop->requested()) return true;
  if (options_.max_rounds >= 0 && rounds_ >= options_.max_rounds) return true;
  return elapsed() >= options_.budget_ns - step_ns_;
}

double Evaluator::progress() const {
  if (options_.max_rounds >= 0) {
    return static_cast<double>(rounds_) /
           static_cast<double>(std::max<i64>(1, options_.max_rounds));
  }
  return static_cast<double>(elapsed()) / static_cast<double>(std::max<i64>(1, options_.budget_ns));
}

double Evaluator::cost(const Timetable& table) const {
  double ends = 0;
  for (const auto& ops : table.order) {
    if (!ops.empty()) ends += static_cast<double>(table.end[ops.back()]);
  }
  return static_cast<double>(table.makespan) + 0.1 * ends / m_.ranks;
}

double Evaluator::run(const Policy& policy, Timetable& table, double limit) {
  ++rounds_;
  const i64 begin = elapsed();
  decoder_.run(policy, table);
  offer(table);
  if (options_.choose_memory && cost(table) <= limit) refill(table);
  step_ns_ = elapsed() - begin;
  return cost(table);
}

void Evaluator::refill(Timetable& table) {
  spare_.order = table.order;
  spare_.level = table.level;
  spare_.split = table.split;
  spare_.start.resize(table.start.size());
  spare_.end.resize(table.end.size());
  for (i32 r = 0; r < m_.ranks; ++r) {
    if (!chooser_.run(spare_, r, false)) return;
  }
  if (!timer_.run(spare_)) return;
  if (cost(spare_) < cost(table)) {
    std::swap(table, spare_);
    offer(table);
  }
}

void Evaluator::offer(const Timetable& table) {
  if (table.makespan >= best_) return;
  best_ = table.makespan;
  const std::lock_guard<std::mutex> lock(shared_.mutex);
  SearchOutcome& outcome = shared_.outcome;
  shared_.evaluations += rounds_ - reported_;
  reported_ = rounds_;
  // Of equals that of the lower thread, so that the outcome does not depend on who was faster.
  const bool tie = table.makespan == outcome.best.makespan && thread_ < outcome.thread;
  if (table.makespan >= outcome.best.makespan && !tie) return;
  outcome.best = table;
  outcome.found_ns = elapsed();
  outcome.thread = thread_;
  outcome.rounds = rounds_;
  if (shared_.listener) {
    shared_.listener(table.makespan, outcome.found_ns, shared_.evaluations.load(), thread_);
  }
}

}  // namespace pipeweaver
