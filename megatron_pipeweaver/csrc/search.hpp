// The anytime search: a portfolio of recipes first, then annealing over keys and levels.
#pragma once

#include "evaluator.hpp"

namespace pipeweaver {

SearchOutcome search(const Model& model, const std::vector<Alone>& alone,
                     const SearchOptions& options, const Timetable& start,
                     const Listener& listener);

}  // namespace pipeweaver
