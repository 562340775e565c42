// Recipes: the few numbers from which a whole policy is made.
#pragma once

#include <vector>

#include "bounds.hpp"
#include "decode.hpp"
#include "model.hpp"
#include "random.hpp"

namespace pipeweaver {

enum class Arrangement : i32 { kGiven, kSmallFirst, kLargeFirst, kZigzag, kShuffled };
enum class Load : i32 { kMemory, kWork, kCount };

struct Recipe {
  double slope = 0;            // how much an op's place in its microbatch's chain delays its key
  i32 weight_class = 6;        // 0: weight gradients at once ... 6: when nothing else can run
  bool enter_last = true;      // first forwards only when no other forward can run
  bool backward_first = true;  // backwards before all forwards
  bool alternate = false;      // forwards and backwards by turns
  Arrangement arrangement = Arrangement::kGiven;
  Load load = Load::kMemory;
  double limit = 8;  // microbatches of average load in flight
  double pace = 0;   // of the average rate at which microbatches may start; 0: any
  i64 patience = 0;
  double hold = 0;            // in average work of a microbatch on a rank
  double level = 0;           // the fastest level at first: 0 the leanest, 1 the fastest
  double slope_backward = 0;  // added to `slope` for backwards and weight gradients
  std::vector<i32> order;     // the microbatches in their arrangement; empty: not arranged yet
};

class Kitchen {
 public:
  explicit Kitchen(const Model& model);

  Policy cook(const Recipe& recipe, bool split, bool in_order) const;
  Recipe invent(Random& random) const;
  // `recipe` with one or two of its numbers changed.
  Recipe vary(Recipe recipe, Random& random) const;
  // What is tried first: recipes that do well on many kinds of problems.
  std::vector<Recipe> classics() const;

 private:
  void arrange(Recipe& recipe, Random& random) const;
  void rearrange(Recipe& recipe, Random& random) const;
  void change(Recipe& recipe, i32 what, Random& random) const;

  const Model& m_;
  Heads heads_;
  std::vector<i64> work_, memory_;  // per microbatch, on rank 0, at the fastest level
};

}  // namespace pipeweaver
