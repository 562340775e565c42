// Recipes: the few numbers from which a whole policy is made.
#pragma once

#include <vector>

#include "bounds.hpp"
#include "decode.hpp"
#include "model.hpp"
#include "random.hpp"
#include "timing.hpp"

namespace pipeweaver {

enum class Arrangement : i32 { kGiven, kSmallFirst, kLargeFirst, kZigzag, kShuffled };
enum class Load : i32 { kMemory, kWork, kCount };
// Where an op stands in the life of its microbatch: on the longest chain of dependencies before
// it, or when it runs if the microbatch has the pipeline for itself, forwards at once or as late
// as its first backward allows.
enum class Timeline : i32 { kChain, kAlone, kAloneLate };
// When weight gradients run: right behind their backward, by a slope of their own, or in gaps.
enum class Weights : i32 { kAtOnce, kSloped, kInGaps };

struct Recipe {
  Timeline timeline = Timeline::kChain;
  // How much an op's time in the life of its microbatch delays its key; the age of a microbatch is
  // the work before it, times `stretch`.
  double slope_forward = 0;
  double slope_backward = 0;
  double slope_weight = 0;
  double stretch = 1;
  Weights weights = Weights::kInGaps;
  bool enter_last = true;      // first forwards only when no other forward can run
  bool backward_first = true;  // backwards before all forwards
  bool alternate = false;      // forwards and backwards by turns
  Arrangement arrangement = Arrangement::kGiven;
  Load load = Load::kMemory;
  double limit = 8;  // microbatches of average load in flight; 0: any number
  double pace = 0;   // of the average rate at which microbatches may start; 0: any
  i64 patience = 0;
  double hold = 0;         // in average work of a microbatch on a rank
  double level = 0;        // the fastest level at first: 0 the leanest, 1 the fastest
  std::vector<i32> order;  // the microbatches in their arrangement; empty: not arranged yet
};

class Kitchen {
 public:
  Kitchen(const Model& model, Decoder& decoder, Timer& timer);

  Policy cook(const Recipe& recipe, bool split, bool in_order) const;
  Recipe invent(Random& random) const;
  // `recipe` with one or two of its numbers changed.
  Recipe vary(Recipe recipe, Random& random) const;
  // What is tried first: recipes that do well on many kinds of problems.
  std::vector<Recipe> classics() const;

 private:
  void live_alone(Decoder& decoder, Timer& timer);
  void arrange(Recipe& recipe, Random& random) const;
  void rearrange(Recipe& recipe, Random& random) const;
  void change(Recipe& recipe, i32 what, Random& random) const;

  const Model& m_;
  std::vector<i64> timelines_[3];   // by Timeline, per op
  std::vector<i64> work_, memory_;  // per microbatch, on rank 0, at the fastest level
};

}  // namespace pipeweaver
