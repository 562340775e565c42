#include "recipe.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace pipeweaver {

namespace {

constexpr i64 kClass = i64{1} << 56;
constexpr i32 kChangeable = 15;

}  // namespace

Kitchen::Kitchen(const Model& model, Decoder& decoder, Timer& timer)
    : m_(model), work_(model.microbatches, 0), memory_(model.microbatches, 0) {
  timelines_[0] = heads_and_tails(model).head;
  live_alone(decoder, timer);
  for (i32 u = 0; u < m_.pairs; ++u) {
    if (m_.pair_rank[u] != 0) continue;
    const i32 k = m_.pass_microbatch[m_.pair_pass[u]];
    const Costs& costs = m_.costs[m_.level_begin[u + 1] - 1];
    work_[k] += costs.forward + costs.backward + costs.weight;
    memory_[k] += costs.memory;
  }
}

// Decodes the microbatches one after another, each alone in the pipeline, and takes down when each
// op runs, from the start of its microbatch on; then once more with forwards as late as possible.
void Kitchen::live_alone(Decoder& decoder, Timer& timer) {
  Policy serial;
  serial.key.resize(3 * static_cast<std::size_t>(m_.pairs));
  serial.level.resize(m_.pairs);
  for (i32 u = 0; u < m_.pairs; ++u) {
    const i64 pass = m_.pair_pass[u];
    serial.key[op_of(u, kForward)] = pass + m_.passes;
    serial.key[op_of(u, kBackward)] = pass;
    serial.key[op_of(u, kWeight)] = pass + 2 * m_.passes;
    serial.level[u] = m_.levels(u) - 1;
  }
  serial.load.assign(m_.microbatches, 1);
  serial.release.assign(m_.microbatches, 0);
  serial.load_limit = 0;
  Timetable table;
  decoder.run(serial, table);
  std::vector<i64> late;
  timer.latest(table, late);
  std::vector<i64> first(m_.microbatches, kNever), first_late(m_.microbatches, kNever);
  for (i32 u = 0; u < m_.pairs; ++u) {
    const i32 k = m_.pass_microbatch[m_.pair_pass[u]], forward = op_of(u, kForward);
    first[k] = std::min(first[k], table.start[forward]);
    first_late[k] = std::min(first_late[k], late[forward]);
  }
  timelines_[1].resize(table.start.size());
  timelines_[2].resize(table.start.size());
  for (i32 op = 0; op < static_cast<i32>(table.start.size()); ++op) {
    const i32 k = m_.pass_microbatch[m_.pair_pass[pair_of(op)]];
    timelines_[1][op] = table.start[op] - first[k];
    timelines_[2][op] = (kind_of(op) == kForward ? late[op] : table.start[op]) - first_late[k];
  }
}

void Kitchen::arrange(Recipe& recipe, Random& random) const {
  std::vector<i32>& order = recipe.order;
  order.resize(m_.microbatches);
  std::iota(order.begin(), order.end(), 0);
  const auto smaller = [&](i32 a, i32 b) { return work_[a] < work_[b]; };
  switch (recipe.arrangement) {
    case Arrangement::kGiven:
      break;
    case Arrangement::kSmallFirst:
      std::stable_sort(order.begin(), order.end(), smaller);
      break;
    case Arrangement::kLargeFirst:
      std::stable_sort(order.begin(), order.end(), [&](i32 a, i32 b) { return smaller(b, a); });
      break;
    case Arrangement::kZigzag: {
      std::vector<i32> sorted = order;
      std::stable_sort(sorted.begin(), sorted.end(), smaller);
      for (std::size_t i = 0; i < order.size(); ++i) {
        order[i] = i % 2 == 0 ? sorted[i / 2] : sorted[order.size() - 1 - i / 2];
      }
      break;
    }
    case Arrangement::kShuffled: {
      for (std::size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random.below(static_cast<i64>(i))]);
      }
      break;
    }
  }
}

// Two microbatches change places, one moves, or a stretch is turned round.
void Kitchen::rearrange(Recipe& recipe, Random& random) const {
  if (m_.microbatches < 2) return;
  const i64 a = random.below(m_.microbatches), b = random.below(m_.microbatches);
  const auto low = recipe.order.begin() + std::min(a, b);
  const auto high = recipe.order.begin() + std::max(a, b);
  switch (random.below(4)) {
    case 0:
      std::reverse(low, high + 1);
      break;
    case 1:
      std::rotate(low, low + 1, high + 1);
      break;
    case 2:
      std::rotate(low, high, high + 1);
      break;
    default:
      std::iter_swap(low, high);
      break;
  }
}

Policy Kitchen::cook(const Recipe& recipe, bool split, bool in_order) const {
  Policy policy;
  policy.split = split;
  policy.in_order = in_order;
  policy.alternate = recipe.alternate;
  policy.patience = recipe.patience;
  std::vector<i32> order = recipe.order;
  if (in_order) std::iota(order.begin(), order.end(), 0);
  std::vector<i64> begin(m_.microbatches, 0);
  i64 total = 0;
  for (const i32 k : order) {
    begin[k] = total;
    total += static_cast<i64>(recipe.stretch * static_cast<double>(work_[k]));
  }
  const double count = std::max(1, m_.microbatches);
  policy.hold = static_cast<i64>(recipe.hold * static_cast<double>(total) / count);
  policy.release.resize(m_.microbatches);
  for (i32 k = 0; k < m_.microbatches; ++k) {
    policy.release[k] = static_cast<i64>(recipe.pace * static_cast<double>(begin[k]));
  }
  switch (recipe.load) {
    case Load::kMemory:
      policy.load = memory_;
      break;
    case Load::kWork:
      policy.load = work_;
      break;
    case Load::kCount:
      policy.load.assign(m_.microbatches, 1);
      break;
  }
  const double load = std::accumulate(policy.load.begin(), policy.load.end(), 0.0) / count;
  policy.load_limit = recipe.limit > 0 ? static_cast<i64>(recipe.limit * load) : kNever;

  policy.key.resize(3 * static_cast<std::size_t>(m_.pairs));
  policy.level.resize(m_.pairs);
  const std::vector<i64>& timeline = timelines_[static_cast<i32>(recipe.timeline)];
  const i64 forward_class = recipe.backward_first ? kClass : 0;
  for (i32 u = 0; u < m_.pairs; ++u) {
    const i32 p = m_.pair_pass[u], k = m_.pass_microbatch[p];
    const auto key = [&](i32 kind, double slope) {
      return begin[k] + static_cast<i64>(slope * static_cast<double>(timeline[op_of(u, kind)]));
    };
    const bool enters = recipe.enter_last && m_.enters(p) && u == m_.pass_begin[p];
    i64& weight = policy.key[op_of(u, kWeight)];
    policy.key[op_of(u, kForward)] =
        key(kForward, recipe.slope_forward) + forward_class + (enters ? 2 * kClass : 0);
    policy.key[op_of(u, kBackward)] = key(kBackward, recipe.slope_backward);
    switch (recipe.weights) {
      case Weights::kAtOnce:
        weight = policy.key[op_of(u, kBackward)];
        break;
      case Weights::kSloped:
        weight = key(kWeight, recipe.slope_weight);
        break;
      case Weights::kInGaps:
        weight = key(kWeight, recipe.slope_weight) + 4 * kClass;
        break;
    }
    policy.level[u] = static_cast<i32>(std::lround(recipe.level * (m_.levels(u) - 1)));
  }
  return policy;
}

void Kitchen::change(Recipe& recipe, i32 what, Random& random) const {
  static constexpr double kLimits[] = {0, 0, 0, 0.6, 0.8, 1, 1.2, 1.5, 1.8, 2.2, 2.7, 3.5};
  static constexpr double kPaces[] = {0, 0, 0, 0, 0, 0.8, 0.9, 1};
  static constexpr double kHolds[] = {0, 0, 0, 0, 0.1, 0.3};
  const auto slope = [&] { return 3.5 * random.unit(); };
  switch (what) {
    case 0:
      recipe.timeline = static_cast<Timeline>(random.below(3));
      break;
    case 1:
      recipe.slope_forward = slope();
      break;
    case 2:
      recipe.slope_backward = slope();
      break;
    case 3:
      recipe.slope_weight = recipe.slope_backward + random.unit();
      break;
    case 4:
      recipe.stretch = 0.9 + 0.4 * random.unit();
      break;
    case 5:
      recipe.weights = static_cast<Weights>(random.below(3));
      break;
    case 6:
      recipe.enter_last = random.below(2) == 0;
      break;
    case 7:
      recipe.backward_first = random.below(4) == 0;
      break;
    case 8:
      recipe.alternate = random.below(4) == 0;
      break;
    case 9:
      recipe.arrangement = static_cast<Arrangement>(random.below(5));
      arrange(recipe, random);
      break;
    case 10:
      recipe.load = static_cast<Load>(random.below(3));
      break;
    case 11:
      recipe.limit = kLimits[random.below(12)] * m_.ranks;
      break;
    case 12:
      recipe.pace = kPaces[random.below(8)];
      break;
    case 13:
      recipe.patience = random.below(3) == 0 ? 128 : 0;
      recipe.hold = kHolds[random.below(6)];
      break;
    default:
      recipe.level = 0.25 * static_cast<double>(random.below(5));
      break;
  }
}

Recipe Kitchen::invent(Random& random) const {
  Recipe recipe;
  for (i32 what = 0; what < kChangeable; ++what) change(recipe, what, random);
  return recipe;
}

Recipe Kitchen::vary(Recipe recipe, Random& random) const {
  const i64 changes = 1 + random.below(2);
  for (i64 i = 0; i < changes; ++i) {
    switch (random.below(10)) {
      case 0:
      case 1:
      case 2:
        change(recipe, static_cast<i32>(random.below(kChangeable)), random);
        break;
      case 3:
        recipe.limit *= 0.8 + 0.45 * random.unit();
        break;
      case 4:
        recipe.slope_forward *= 0.85 + 0.3 * random.unit();
        break;
      case 5:
        recipe.slope_backward *= 0.85 + 0.3 * random.unit();
        break;
      case 6:
        recipe.stretch *= 0.97 + 0.06 * random.unit();
        break;
      default:
        rearrange(recipe, random);
        break;
    }
  }
  return recipe;
}

std::vector<Recipe> Kitchen::classics() const {
  const i32 ranks = m_.ranks;
  Random random(0);
  std::vector<Recipe> recipes;
  const auto add = [&](auto set) {
    Recipe recipe;
    recipe.limit = 1.0 * ranks;
    set(recipe);
    arrange(recipe, random);
    recipes.push_back(recipe);
  };
  const auto alone = [&](Timeline timeline, Arrangement arrangement, double slope, double stretch) {
    add([&](Recipe& r) {
      r.timeline = timeline, r.slope_forward = r.slope_backward = slope, r.stretch = stretch;
      r.weights = Weights::kAtOnce, r.enter_last = r.backward_first = false;
      r.arrangement = arrangement, r.limit = 0;
    });
  };
  const auto sloped = [](Recipe& r, double slope) {
    r.slope_forward = r.slope_backward = r.slope_weight = slope;
  };
  alone(Timeline::kAlone, Arrangement::kLargeFirst, 2.2, 1.15);
  add([&](Recipe& r) {
    sloped(r, 1.25), r.enter_last = false, r.backward_first = false;
    r.arrangement = Arrangement::kSmallFirst, r.load = Load::kCount;
  });
  alone(Timeline::kAloneLate, Arrangement::kSmallFirst, 2.0, 1.1);
  add([&](Recipe& r) { sloped(r, 1), r.limit = 2.2 * ranks; });
  add([&](Recipe& r) {
    r.timeline = Timeline::kAlone, r.arrangement = Arrangement::kSmallFirst, r.level = 1;
    r.slope_forward = 2.5, r.slope_backward = r.slope_weight = 1.25, r.stretch = 1.05, r.limit = 0;
    r.backward_first = false;
  });
  add([&](Recipe& r) { r.limit = 3.5 * ranks, r.level = 0.5; });
  alone(Timeline::kAlone, Arrangement::kSmallFirst, 2.35, 1.1);
  add([&](Recipe& r) { r.enter_last = false, r.load = Load::kWork, r.limit = 1.6 * ranks; });
  add([&](Recipe& r) {
    r.timeline = Timeline::kAloneLate, r.arrangement = Arrangement::kSmallFirst, r.level = 0.75;
    r.slope_forward = 3.2, r.slope_backward = 1.9, r.stretch = 0.95, r.limit = 0;
    r.weights = Weights::kAtOnce, r.backward_first = false;
  });
  add([&](Recipe& r) {
    sloped(r, 1.25), r.enter_last = false, r.backward_first = false;
    r.arrangement = Arrangement::kZigzag, r.limit = 3.5 * ranks, r.level = 1;
  });
  alone(Timeline::kAlone, Arrangement::kZigzag, 2.1, 1.1);
  add([&](Recipe& r) { r.load = Load::kWork, r.limit = 1.2 * ranks, r.level = 1; });
  return recipes;
}

}  // namespace pipeweaver
