// Lower bounds of the makespan; the proofs are in search/bounds.py.
#pragma once

#include <vector>

#include "model.hpp"

namespace pipeweaver {

struct Bounds {
  i64 critical_path = 0;
  std::vector<i64> jackson;      // per rank
  std::vector<i64> time_memory;  // per rank
};

// Per op, with every part of every stage pair at its shortest: the longest chain before it starts
// (`head`) and after it ends (`tail`).
struct Heads {
  std::vector<i64> shortest, head, tail;
};

Heads heads_and_tails(const Model& model);
Bounds lower_bounds(const Model& model);

}  // namespace pipeweaver
