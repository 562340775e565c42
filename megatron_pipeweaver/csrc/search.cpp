#include "search.hpp"

#include <algorithm>
#include <cmath>
#include <thread>
#include <utility>

#include "explore.hpp"
#include "local.hpp"

namespace pipeweaver {

namespace {

struct Candidate {
  Policy policy;
  Timetable table;
  double cost = 1e300;
};

constexpr std::size_t kFavourites = 4;
constexpr double kWarmths[] = {0.05, 1, 0.3, 3};  // of the local search, cycle by cycle
constexpr i64 kPatience = 1000;      // evaluations without progress that end a phase early
constexpr double kPortfolio = 0.45;  // of the time goes to recipes,
constexpr double kAnneal = 0.6;      // up to here to keys, the rest to orders

class Worker {
 public:
  Worker(const Model& model, Evaluator& evaluator, Random& random)
      : m_(model),
        evaluator_(evaluator),
        random_(random),
        kitchen_(model, evaluator.decoder(), evaluator.timer()) {}

  void run() {
    if (m_.pairs == 0) return;
    Candidate best = anneal(portfolio());
    LocalSearch local(m_, evaluator_, random_);
    const i64 moves = 300 * m_.pairs;
    for (i64 cycle = 0; !evaluator_.over(); ++cycle) {
      local.run(best.table, moves, kWarmths[cycle % 4]);
    }
  }

 private:
  // Decodes what `recipe` makes, with the strategies it chose fed back into the order.
  Candidate try_recipe(const Recipe& recipe, double best) {
    Candidate candidate;
    const SearchOptions& options = evaluator_.options();
    candidate.policy = kitchen_.cook(recipe, options.split, options.in_order);
    Policy policy = candidate.policy;
    Timetable table;
    double last = 1e300;
    for (int again = 0; again < 5; ++again) {
      const double found = evaluator_.run(policy, table, 1e299);
      if (found < candidate.cost) {
        candidate.cost = found;
        candidate.policy = policy;
        candidate.table = table;
      }
      if (again > 0 && (found >= last * 0.9995 || candidate.cost > best * 1.03)) break;
      if (evaluator_.over()) break;
      last = found;
      policy.level = table.level;
    }
    return candidate;
  }

  struct Favourite {
    double cost;
    Recipe recipe;
  };

  // Classic recipes, then new ones and variations of the few best.
  Candidate portfolio() {
    Candidate best;
    i64 patience = kPatience;
    std::vector<Favourite> favourites;
    const std::vector<Recipe> classics = kitchen_.classics();
    for (std::size_t i = 0; best.cost >= 1e300 || evaluator_.progress() < kPortfolio; ++i) {
      if (best.cost < 1e300 && (evaluator_.over() || evaluator_.rounds() > patience)) break;
      Recipe recipe;
      if (i < classics.size()) {
        recipe = classics[(i + evaluator_.seed()) % classics.size()];
      } else if (random_.below(4) == 0) {
        recipe = kitchen_.invent(random_);
      } else {
        // The better half of the time the best, else any of the favourites.
        const i64 pick =
            random_.below(2) == 0 ? 0 : random_.below(static_cast<i64>(favourites.size()));
        recipe = kitchen_.vary(favourites[pick].recipe, random_);
      }
      Candidate candidate = try_recipe(recipe, best.cost);
      remember(favourites, {candidate.cost, recipe});
      if (candidate.cost >= best.cost) continue;
      best = std::move(candidate);
      patience = evaluator_.rounds() + kPatience;
    }
    return best;
  }

  static void remember(std::vector<Favourite>& favourites, Favourite one) {
    const auto at = std::find_if(favourites.begin(), favourites.end(),
                                 [&](const Favourite& other) { return one.cost < other.cost; });
    if (std::any_of(favourites.begin(), favourites.end(),
                    [&](const Favourite& other) { return one.cost == other.cost; })) {
      return;
    }
    favourites.insert(at, std::move(one));
    if (favourites.size() > kFavourites) favourites.pop_back();
  }

  Candidate anneal(Candidate current) {
    adopt(current);
    Candidate best = current;
    Policy trial = current.policy;
    Timetable table;
    const double begin = evaluator_.progress();
    i64 patience = evaluator_.rounds() + kPatience;
    while (!evaluator_.over() && evaluator_.progress() < kAnneal &&
           evaluator_.rounds() < patience) {
      const double done = (evaluator_.progress() - begin) / std::max(1e-9, kAnneal - begin);
      const double heat = 0.0002 * current.cost * std::pow(0.05, done);
      trial = current.policy;
      perturb(trial, current.table);
      const double limit = current.cost - heat * std::log(std::max(random_.unit(), 1e-12));
      const double found = evaluator_.run(trial, table, limit + 0.01 * current.cost);
      if (found > limit) continue;
      current.policy = trial;
      std::swap(current.table, table);
      current.cost = found;
      adopt(current);
      if (found >= best.cost) continue;
      best = current;
      patience = evaluator_.rounds() + kPatience;
    }
    return best;
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
  Evaluator& evaluator_;
  Random& random_;
  Kitchen kitchen_;
};

// The paper's policy for exploration: the dual queue, anything admitted that fits.
Policy plain_policy(const Model& model, const SearchOptions& options) {
  Policy policy;
  policy.key.assign(3 * static_cast<std::size_t>(model.pairs), 0);
  policy.level.assign(model.pairs, 0);
  policy.load.assign(model.microbatches, 1);
  policy.release.assign(model.microbatches, 0);
  policy.split = options.split;
  policy.in_order = options.in_order;
  return policy;
}

}  // namespace

SearchOutcome search(const Model& model, const std::vector<Alone>& alone,
                     const SearchOptions& options, const Timetable& start,
                     const Listener& listener) {
  Shared shared;
  shared.outcome.best = start;
  shared.begin = Clock::now();
  shared.listener = listener;
  Tree tree(Segments(model, options.grouped).count());
  const auto work = [&](i32 thread) {
    Random random(options.seed + static_cast<std::uint64_t>(thread));
    Evaluator evaluator(model, alone, options, shared, thread);
    if (static_cast<Exploration>(options.exploration) == Exploration::kFull) {
      Worker(model, evaluator, random).run();
    } else if (model.pairs > 0) {
      explore(model, evaluator, random, tree, plain_policy(model, options));
    }
  };
  std::vector<std::thread> threads;
  for (i32 t = 1; t < options.threads; ++t) threads.emplace_back(work, t);
  work(0);
  for (std::thread& thread : threads) thread.join();
  shared.outcome.evaluations = shared.evaluations;
  return std::move(shared.outcome);
}

}  // namespace pipeweaver
