// One thread's tools: decode, choose strategies, keep the best, watch the clock.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>

#include "decode.hpp"
#include "memory.hpp"
#include "model.hpp"
#include "random.hpp"
#include "recipe.hpp"
#include "timing.hpp"

namespace pipeweaver {

enum class Exploration : i32 { kFull, kTree, kDepthFirst, kRandom };

// Has searches end with the best they found so far; any thread may ask for it, at any time.
class Stop {
 public:
  void request() { requested_.store(true, std::memory_order_relaxed); }
  bool requested() const { return requested_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> requested_{false};
};

struct SearchOptions {
  i64 budget_ns = 0;
  i32 threads = 1;
  std::uint64_t seed = 0;
  i64 max_rounds = -1;  // evaluations per thread; -1: until the time is up
  bool split = true;
  bool in_order = false;
  bool choose_memory = true;  // strategies are chosen anew for the orders that come out
  i32 exploration = 0;        // an Exploration
  bool alternate = true;      // explorations but the full one run forwards and backwards by turns
  bool grouped = true;        // and give a module's segments within a microbatch one priority
  double tree_alpha = 2;      // the paper's alpha and beta
  double tree_beta = 0.05;
  std::shared_ptr<const Stop> stop;  // null: nobody ends the search early
};

struct SearchOutcome {
  Timetable best;
  i64 evaluations = 0;
  i64 found_ns = 0;
  i64 rounds = 0;  // of the thread that found it, when it did
  i32 thread = 0;
};

// Called under a lock whenever a better schedule is found: makespan, nanoseconds, evaluations,
// thread.
using Listener = std::function<void(i64, i64, i64, i32)>;
using Clock = std::chrono::steady_clock;

// What all threads see.
struct Shared {
  std::mutex mutex;
  SearchOutcome outcome;
  std::atomic<i64> evaluations{0};
  Clock::time_point begin;
  Listener listener;
};

class Evaluator {
 public:
  Evaluator(const Model& model, const std::vector<Alone>& alone, const SearchOptions& options,
            Shared& shared, i32 thread);
  ~Evaluator() { shared_.evaluations += rounds_ - reported_; }
  Evaluator(const Evaluator&) = delete;
  Evaluator& operator=(const Evaluator&) = delete;

  // Whether the time, less what the next evaluation may take, or the rounds are up, or somebody
  // has asked for the end.
  bool over() const;
  // How far the search is, from 0 to 1.
  double progress() const;
  // Decodes `policy`; if the result costs at most `limit`, chooses the strategies anew for the
  // order that came out and keeps the better of the two. What is found is offered as the best.
  double run(const Policy& policy, Timetable& table, double limit);
  // The makespan, and a little of when each rank is done, so that progress shows on all ranks.
  double cost(const Timetable& table) const;

  const SearchOptions& options() const { return options_; }
  // Thread t of seed s does what one thread of seed s + t does.
  std::uint64_t seed() const { return options_.seed + static_cast<std::uint64_t>(thread_); }
  // A schedule that may be the best.
  void offer(const Timetable& table);
  // One more evaluation was made elsewhere.
  void count() {
    ++rounds_;
    step_ns_ = 0;
  }
  i64 rounds() const { return rounds_; }
  Decoder& decoder() { return decoder_; }
  Timer& timer() { return timer_; }

 private:
  i64 elapsed() const;
  void refill(Timetable& table);

  const Model& m_;
  const SearchOptions& options_;
  Shared& shared_;
  i32 thread_;
  Decoder decoder_;
  Timer timer_;
  MemoryChooser chooser_;
  Timetable spare_;
  i64 rounds_ = 0;
  i64 reported_ = 0;
  i64 best_ = kNever;
  i64 step_ns_ = 0;  // what the last evaluation took
};

}  // namespace pipeweaver
