// The anytime search: a portfolio of policies first, then annealing over keys and levels.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "decode.hpp"
#include "memory.hpp"
#include "model.hpp"
#include "recipe.hpp"
#include "timing.hpp"

namespace pipeweaver {

struct SearchOptions {
  i64 budget_ns = 0;
  i32 threads = 1;
  std::uint64_t seed = 0;
  i64 max_rounds = -1;  // per thread; -1: until the time is up
  bool split = true;
  bool in_order = false;
};

struct SearchOutcome {
  Timetable best;
  i64 evaluations = 0;
  i64 found_ns = 0;
  i64 rounds = 0;
  i32 thread = 0;
};

using Clock = std::chrono::steady_clock;

// Called under a lock whenever a better schedule is found: makespan, nanoseconds, evaluations,
// thread.
using Listener = std::function<void(i64, i64, i64, i32)>;

SearchOutcome search(const Model& model, const std::vector<Alone>& alone,
                     const SearchOptions& options, const Timetable& start,
                     const Listener& listener);

}  // namespace pipeweaver
