// What one microbatch needs when it runs alone at its leanest strategies.
#pragma once

#include <vector>

#include "model.hpp"

namespace pipeweaver {

// A forward step of a microbatch that runs alone, pass after pass: the forward of all stages of a
// pass with a backward (`stage` is -1), or of one stage of a frozen pass. It starts when
// `releases` stages of the microbatch have given their memory back.
struct Step {
  i32 pass;
  i32 stage;
  i32 releases;
};

struct Alone {
  bool feasible = true;
  bool decided = true;      // false: too many orders to try them all
  i32 rank = -1;            // where it does not fit
  i64 bytes = 0;            // the least that is known to be needed there
  std::vector<i64> peak;    // per rank; what admission sets aside for this microbatch
  bool narrow = true;       // the peak allows every order of its passes
  std::vector<Step> steps;  // not narrow: the order that fits
};

Alone run_alone(const Model& model, i32 microbatch, bool in_order);

}  // namespace pipeweaver
