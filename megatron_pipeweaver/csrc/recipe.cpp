#include "recipe.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace pipeweaver {

namespace {

constexpr i64 kClass = i64{1} << 56;
constexpr i32 kChangeable = 12;

}  // namespace

Kitchen::Kitchen(const Model& model)
    : m_(model),
      heads_(heads_and_tails(model)),
      work_(model.microbatches, 0),
      memory_(model.microbatches, 0) {
  for (i32 u = 0; u < m_.pairs; ++u) {
    if (m_.pair_rank[u] != 0) continue;
    const i32 k = m_.pass_microbatch[m_.pair_pass[u]];
    const Costs& costs = m_.costs[m_.level_begin[u + 1] - 1];
    work_[k] += costs.forward + costs.backward + costs.weight;
    memory_[k] += costs.memory;
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
    total += work_[k];
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
  policy.load_limit = static_cast<i64>(recipe.limit * load);

  policy.key.resize(3 * static_cast<std::size_t>(m_.pairs));
  policy.level.resize(m_.pairs);
  const i64 forward_class = recipe.backward_first ? 2 : 1;
  for (i32 u = 0; u < m_.pairs; ++u) {
    const i32 p = m_.pair_pass[u], k = m_.pass_microbatch[p];
    const auto key = [&](i32 kind) {
      return begin[k] +
             static_cast<i64>(recipe.slope * static_cast<double>(heads_.head[op_of(u, kind)]));
    };
    const bool enters = recipe.enter_last && m_.enters(p) && u == m_.pass_begin[p];
    policy.key[op_of(u, kForward)] = key(kForward) + (forward_class + (enters ? 2 : 0)) * kClass;
    policy.key[op_of(u, kBackward)] = key(kBackward) + kClass;
    policy.key[op_of(u, kWeight)] = key(kWeight) + recipe.weight_class * kClass;
    policy.level[u] = static_cast<i32>(std::lround(recipe.level * (m_.levels(u) - 1)));
  }
  return policy;
}

void Kitchen::change(Recipe& recipe, i32 what, Random& random) const {
  static constexpr double kSlopes[] = {-1, -0.5, 0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2};
  static constexpr i32 kWeights[] = {0, 1, 3, 6, 6, 6};
  static constexpr double kLimits[] = {0.6, 0.8, 1, 1.2, 1.5, 1.8, 2.2, 2.7, 3.5, 5, 8};
  static constexpr double kPaces[] = {0, 0, 0, 0, 0.8, 0.9, 1};
  static constexpr double kHolds[] = {0, 0, 0, 0.1, 0.3};
  switch (what) {
    case 0:
      recipe.slope = kSlopes[random.below(10)];
      break;
    case 1:
      recipe.weight_class = kWeights[random.below(6)];
      break;
    case 2:
      recipe.enter_last = random.below(2) == 0;
      break;
    case 3:
      recipe.backward_first = random.below(2) == 0;
      break;
    case 4:
      recipe.alternate = random.below(3) == 0;
      break;
    case 5:
      recipe.arrangement = static_cast<Arrangement>(random.below(5));
      arrange(recipe, random);
      break;
    case 6:
      recipe.load = static_cast<Load>(random.below(3));
      break;
    case 7:
      recipe.limit = kLimits[random.below(11)] * m_.ranks;
      break;
    case 8:
      recipe.pace = kPaces[random.below(7)];
      break;
    case 9:
      recipe.patience = random.below(3) == 0 ? 128 : 0;
      break;
    case 10:
      recipe.hold = kHolds[random.below(5)];
      break;
    default:
      recipe.level = 0.5 * static_cast<double>(random.below(3));
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
    switch (random.below(8)) {
      case 0:
      case 1:
        change(recipe, static_cast<i32>(random.below(kChangeable)), random);
        break;
      case 2:
        recipe.limit *= 0.8 + 0.45 * random.unit();
        break;
      case 3:
        recipe.slope += random.unit() - 0.5;
        break;
      case 4:
        recipe.slope_backward += random.unit() - 0.5;
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
  add([&](Recipe& r) {
    r.slope = 1.25, r.enter_last = false, r.backward_first = false;
    r.arrangement = Arrangement::kSmallFirst, r.load = Load::kCount;
  });
  add([&](Recipe& r) { r.slope = 1, r.limit = 2.2 * ranks; });
  add([&](Recipe& r) { r.limit = 3.5 * ranks, r.level = 0.5; });
  add([&](Recipe& r) { r.enter_last = false, r.load = Load::kWork, r.limit = 1.6 * ranks; });
  add([&](Recipe& r) {
    r.slope = 1.25, r.enter_last = false, r.backward_first = false;
    r.arrangement = Arrangement::kZigzag, r.limit = 3.5 * ranks, r.level = 1;
  });
  add([&](Recipe& r) {
    r.slope = 0.25, r.enter_last = false, r.weight_class = 0, r.alternate = true;
    r.arrangement = Arrangement::kSmallFirst, r.load = Load::kCount, r.limit = 1.6 * ranks;
  });
  add([&](Recipe& r) { r.load = Load::kWork, r.limit = 1.2 * ranks, r.level = 1; });
  add([&](Recipe& r) {
    r.slope = 0.75, r.enter_last = false, r.weight_class = 3, r.load = Load::kWork;
    r.limit = 2.7 * ranks, r.level = 0.5;
  });
  return recipes;
}

}  // namespace pipeweaver
