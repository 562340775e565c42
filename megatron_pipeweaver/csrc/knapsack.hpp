// Multiple-choice knapsack over live intervals (paper 4.3), with a proven gap.
//
// Item i is held in the slots [begin, until) and takes one of its candidates: the sum of latencies
// is to be least, while in every slot the memory of what is held stays within the capacity. A price
// per slot (Lagrange multipliers) gives a bound: every item then chooses for itself what is
// cheapest, and the best prices give the bound of the linear relaxation. Subgradient steps raise
// the bound; a greedy choice, first by length of the interval, then by the prices found, comes down
// towards it, and the search ends when the two are as close as asked for.
#pragma once

#include <vector>

#include "model.hpp"

namespace pipeweaver {

struct Knapsack {
  std::vector<i32> begin, until;     // per item
  std::vector<i32> candidate_begin;  // item -> its candidates; items + 1 entries
  std::vector<i64> latency, memory;  // per candidate
  i64 capacity = 0;
};

struct KnapsackChoice {
  bool feasible = false;    // false: the leanest candidates do not fit together
  std::vector<i32> chosen;  // per item: its candidate, counted from its first
  i64 latency = 0;          // the sum
  i64 bound = 0;            // no choice has a lesser sum
};

// Ends when the sum is at most `gap` over the bound, or after `rounds` steps of the prices.
KnapsackChoice choose_candidates(const Knapsack& knapsack, double gap, i32 rounds);

}  // namespace pipeweaver
