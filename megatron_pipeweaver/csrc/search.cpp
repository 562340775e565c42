#include "search.hpp"

#include <algorithm>
#include <cmath>
#include <thread>

namespace pipeweaver {

namespace {

// What all threads see.
struct Shared {
  std::mutex mutex;
  SearchOutcome outcome;
  std::atomic<i64> evaluations{0};
  Clock::time_point begin;
  Listener listener;
};

struct Candidate {
  Policy policy;
  Timetable table;
  double cost = 1e300;
};

constexpr double kPortfolio = 0.6;  // of the time goes to recipes

class Worker {
 public:
  Worker(const Model& model, const std::vector<Alone>& alone, const SearchOptions& options,
         Shared& shared, i32 thread)
      : m_(model),
        options_(options),
        shared_(shared),
        thread_(thread),
        random_(options.seed * 1000003 + static_cast<std::uint64_t>(thread)),
        kitchen_(model),
        decoder_(model, alone),
        timer_(model),
        chooser_(model) {}

  void run() {
    if (m_.pairs == 0) return;
    Candidate current = portfolio();
    anneal(std::move(current));
    shared_.evaluations += evaluations_ - reported_;
  }

 private:
  i64 elapsed() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - shared_.begin)
        .count();
  }
  bool over() const {
    if (options_.max_rounds >= 0 && rounds_ >= options_.max_rounds) return true;
    return elapsed() >= options_.budget_ns;
  }
  // How far the search is, from 0 to 1.
  double progress() const {
    if (options_.max_rounds >= 0) {
      return static_cast<double>(rounds_) / static_cast<double>(options_.max_rounds);
    }
    return static_cast<double>(elapsed()) / static_cast<double>(options_.budget_ns);
  }

  // The makespan, and a little of when each rank is done, so that progress shows on all ranks.
  double cost(const Timetable& table) const {
    double ends = 0;
    for (const auto& ops : table.order) {
      if (!ops.empty()) ends += static_cast<double>(table.end[ops.back()]);
    }
    return static_cast<double>(table.makespan) + 0.1 * ends / m_.ranks;
  }

  void offer(const Timetable& table) {
    if (table.makespan >= best_) return;
    best_ = table.makespan;
    const std::lock_guard<std::mutex> lock(shared_.mutex);
    SearchOutcome& outcome = shared_.outcome;
    shared_.evaluations += evaluations_ - reported_;
    reported_ = evaluations_;
    if (table.makespan >= outcome.best.makespan) {
      return;
    }
    outcome.best = table;
    outcome.found_ns = elapsed();
    outcome.thread = thread_;
    outcome.rounds = rounds_;
    if (shared_.listener) {
      shared_.listener(table.makespan, outcome.found_ns, shared_.evaluations.load(), thread_);
    }
  }

  // Decodes `policy`, then chooses the strategies anew for the order that came out.
  void evaluate(const Policy& policy, Timetable& table, double worth_refilling) {
    ++rounds_;
    ++evaluations_;
    decoder_.run(policy, table);
    offer(table);
    if (cost(table) > worth_refilling) return;
    refill(table);
  }

  void refill(Timetable& table) {
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

  // Decodes what `recipe` makes, with the strategies it chose fed back into the order.
  Candidate try_recipe(const Recipe& recipe, double best) {
    Candidate candidate;
    candidate.policy = kitchen_.cook(recipe, options_.split, options_.in_order);
    Policy policy = candidate.policy;
    Timetable table;
    double last = 1e300;
    for (int again = 0; again < 5; ++again) {
      evaluate(policy, table, 1e299);
      const double found = cost(table);
      if (found < candidate.cost) {
        candidate.cost = found;
        candidate.policy = policy;
        candidate.table = table;
      }
      if (again > 0 && (found >= last * 0.9995 || candidate.cost > best * 1.03)) break;
      if (over()) break;
      last = found;
      policy.level = table.level;
    }
    return candidate;
  }

  // Classic recipes, then new ones and variations of the best.
  Candidate portfolio() {
    Candidate best;
    Recipe favourite;
    const std::vector<Recipe> classics = Kitchen::classics(m_.ranks);
    for (std::size_t i = 0; best.cost >= 1e300 || progress() < kPortfolio; ++i) {
      if (best.cost < 1e300 && over()) break;
      const Recipe recipe = i < classics.size()
                                ? classics[(i + thread_) % classics.size()]
                                : (random_.below(3) == 0 ? kitchen_.invent(random_)
                                                         : kitchen_.vary(favourite, random_));
      Candidate candidate = try_recipe(recipe, best.cost);
      if (candidate.cost < best.cost) {
        best = std::move(candidate);
        favourite = recipe;
      }
    }
    return best;
  }

  void anneal(Candidate current) {
    adopt(current);
    Candidate best = current;
    Policy trial = current.policy;
    Timetable table;
    while (!over()) {
      const double done = progress();
      const double heat = 0.0002 * current.cost * std::pow(0.05, done);
      trial = current.policy;
      perturb(trial, current.table);
      const double limit = current.cost - heat * std::log(std::max(random_.unit(), 1e-12));
      evaluate(trial, table, limit + 0.01 * current.cost);
      const double found = cost(table);
      if (found > limit) continue;
      current.policy = trial;
      std::swap(current.table, table);
      current.cost = found;
      adopt(current);
      if (found < best.cost) best = current;
    }
  }

  // The keys become the times at which the ops start: what is found is where the next step starts.
  void adopt(Candidate& candidate) const {
    Policy& policy = candidate.policy;
    policy.level = candidate.table.level;
    policy.key = candidate.table.start;
  }

  i64 spread(i64 most) { return random_.below(2 * most + 1) - most; }

  void shift_pass(Policy& policy, i32 pass, i64 by, bool forward, bool backward, bool weight) {
    for (i32 u = m_.pass_begin[pass]; u < m_.pass_begin[pass + 1]; ++u) {
      if (forward) policy.key[op_of(u, kForward)] += by;
      if (backward) policy.key[op_of(u, kBackward)] += by;
      if (weight) policy.key[op_of(u, kWeight)] += by;
    }
  }

  void perturb(Policy& policy, const Timetable& table) {
    const i64 step = std::max<i64>(1, table.makespan / std::max(1, m_.microbatches));
    const i32 kind = static_cast<i32>(random_.below(8));
    if (kind == 0) {  // a microbatch earlier or later
      const i32 k = static_cast<i32>(random_.below(m_.microbatches));
      const i64 by = spread(3 * step);
      for (i32 i = m_.microbatch_passes.begin[k]; i < m_.microbatch_passes.begin[k + 1]; ++i) {
        shift_pass(policy, m_.microbatch_passes.items[i], by, true, true, true);
      }
    } else if (kind == 1) {  // two microbatches change places
      swap_microbatches(policy, table);
    } else if (kind <= 3) {  // the forwards or backwards of a pass
      const i32 pass = static_cast<i32>(random_.below(m_.passes));
      const bool forward = random_.below(2) == 0;
      shift_pass(policy, pass, spread(2 * step), forward, !forward, !forward);
    } else if (kind == 4) {  // weight gradients of a pass
      const i32 pass = static_cast<i32>(random_.below(m_.passes));
      shift_pass(policy, pass, spread(3 * step), false, false, true);
    } else if (kind == 5) {  // everything on a rank within a window
      const i32 rank = static_cast<i32>(random_.below(m_.ranks));
      noise(policy, table, step, rank);
    } else if (kind == 6) {
      noise(policy, table, step, -1);
    } else {
      const i32 pass = static_cast<i32>(random_.below(m_.passes));
      const i32 by = random_.below(2) == 0 ? -1 : 1;
      const i32 from = static_cast<i32>(random_.below(m_.ranks));
      for (i32 u = m_.pass_begin[pass]; u < m_.pass_begin[pass + 1]; ++u) {
        if (m_.pair_rank[u] < from) continue;
        policy.level[u] = std::clamp(policy.level[u] + by, 0, m_.levels(u) - 1);
      }
      policy.load_limit = kNever;
    }
  }

  void swap_microbatches(Policy& policy, const Timetable& table) {
    if (m_.microbatches < 2) return;
    const i32 a = static_cast<i32>(random_.below(m_.microbatches));
    const i32 b = static_cast<i32>(random_.below(m_.microbatches));
    const i64 by = first_start(table, b) - first_start(table, a);
    for (i32 i = m_.microbatch_passes.begin[a]; i < m_.microbatch_passes.begin[a + 1]; ++i) {
      shift_pass(policy, m_.microbatch_passes.items[i], by, true, true, true);
    }
    for (i32 i = m_.microbatch_passes.begin[b]; i < m_.microbatch_passes.begin[b + 1]; ++i) {
      shift_pass(policy, m_.microbatch_passes.items[i], -by, true, true, true);
    }
  }

  i64 first_start(const Timetable& table, i32 k) const {
    i64 first = kNever;
    for (i32 i = m_.microbatch_passes.begin[k]; i < m_.microbatch_passes.begin[k + 1]; ++i) {
      const i32 pair = m_.pass_begin[m_.microbatch_passes.items[i]];
      if (pair < m_.pairs) first = std::min(first, table.start[op_of(pair, kForward)]);
    }
    return first == kNever ? 0 : first;
  }

  void noise(Policy& policy, const Timetable& table, i64 step, i32 rank) {
    const i64 from = random_.below(table.makespan + 1);
    const i64 until = from + 1 + random_.below(4 * step);
    for (i32 r = 0; r < m_.ranks; ++r) {
      if (rank >= 0 && r != rank) continue;
      for (const i32 op : table.order[r]) {
        if (table.start[op] >= from && table.start[op] < until) policy.key[op] += spread(step);
      }
    }
  }

  const Model& m_;
  const SearchOptions& options_;
  Shared& shared_;
  i32 thread_;
  Random random_;
  Kitchen kitchen_;
  Decoder decoder_;
  Timer timer_;
  MemoryChooser chooser_;
  Timetable spare_;
  i64 rounds_ = 0;
  i64 evaluations_ = 0;
  i64 reported_ = 0;
  i64 best_ = kNever;
};

}  // namespace

SearchOutcome search(const Model& model, const std::vector<Alone>& alone,
                     const SearchOptions& options, const Timetable& start,
                     const Listener& listener) {
  Shared shared;
  shared.outcome.best = start;
  shared.begin = Clock::now();
  shared.listener = listener;
  std::vector<std::thread> threads;
  for (i32 t = 1; t < options.threads; ++t) {
    threads.emplace_back([&, t] { Worker(model, alone, options, shared, t).run(); });
  }
  Worker(model, alone, options, shared, 0).run();
  for (std::thread& thread : threads) thread.join();
  shared.outcome.evaluations = shared.evaluations;
  return std::move(shared.outcome);
}

}  // namespace pipeweaver
