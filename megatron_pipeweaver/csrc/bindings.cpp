// The only file that knows Python.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>

#include "alone.hpp"
#include "bounds.hpp"
#include "decode.hpp"
#include "knapsack.hpp"
#include "local.hpp"
#include "memory.hpp"
#include "model.hpp"
#include "plan.hpp"
#include "search.hpp"
#include "timing.hpp"

namespace py = pybind11;
using namespace pipeweaver;

namespace {

// A problem ready to be decoded; the answers to "what does each microbatch need alone" with it.
class Core {
 public:
  Core(const RawProblem& raw, bool in_order) : model_(raw), in_order_(in_order) {
    for (i32 k = 0; k < model_.microbatches; ++k) {
      alone_.push_back(run_alone(model_, k, in_order));
    }
  }

  // (microbatch, rank, bytes, proven) of the first one that does not fit alone.
  std::optional<std::tuple<i32, i32, i64, bool>> shortage() const {
    for (i32 k = 0; k < model_.microbatches; ++k) {
      if (!alone_[k].feasible) {
        return std::tuple{k, alone_[k].rank, alone_[k].bytes, alone_[k].decided};
      }
    }
    return std::nullopt;
  }

  Timetable decode(const Policy& policy) const {
    check(policy);
    py::gil_scoped_release release;
    Timetable table;
    Decoder decoder(model_, alone_);
    if (!decoder.run(policy, table)) throw std::logic_error("the decoder cannot go on");
    return table;
  }

  Timetable retime(std::vector<std::vector<i32>> order, std::vector<i32> level, bool split) const {
    Timetable table;
    table.order = std::move(order);
    table.level = std::move(level);
    table.split = split;
    table.start.assign(3 * static_cast<std::size_t>(model_.pairs), 0);
    table.end.assign(3 * static_cast<std::size_t>(model_.pairs), 0);
    if (!Timer(model_).run(table)) throw py::value_error("the orders wait in a ring");
    return table;
  }

  Timetable refill(Timetable table, bool keep) const {
    MemoryChooser chooser(model_);
    for (i32 r = 0; r < model_.ranks; ++r) {
      if (!chooser.run(table, r, keep)) throw py::value_error("the order does not fit");
    }
    if (!Timer(model_).run(table)) throw py::value_error("the orders wait in a ring");
    return table;
  }

  // What the local search makes of `table` in so many moves.
  Timetable improve(Timetable table, i64 moves, std::uint64_t seed, double warmth) const {
    SearchOptions options;
    options.budget_ns = kNever;
    options.max_rounds = moves;
    options.in_order = in_order_;
    Shared shared;
    shared.outcome.best = table;
    shared.begin = Clock::now();
    Random random(seed);
    Evaluator evaluator(model_, alone_, options, shared, 0);
    py::gil_scoped_release release;
    LocalSearch(model_, evaluator, random).run(table, moves, warmth);
    return std::move(shared.outcome.best);
  }

  SearchOutcome run_search(const SearchOptions& options, const Timetable& start,
                           const std::function<void(i64, i64, i64, i32)>& listener) const {
    Listener guarded;
    if (listener) {
      guarded = [&listener](i64 makespan, i64 elapsed, i64 evaluations, i32 thread) {
        py::gil_scoped_acquire acquire;
        listener(makespan, elapsed, evaluations, thread);
      };
    }
    py::gil_scoped_release release;
    return search(model_, alone_, options, start, guarded);
  }

  const Model& model() const { return model_; }
  const std::vector<Alone>& alone() const { return alone_; }

 private:
  void check(const Policy& policy) const {
    const auto microbatches = static_cast<std::size_t>(model_.microbatches);
    if (policy.key.size() != 3 * static_cast<std::size_t>(model_.pairs) ||
        policy.load.size() != microbatches || policy.release.size() != microbatches ||
        policy.level.size() != static_cast<std::size_t>(model_.pairs)) {
      throw py::value_error("policy: a list has the wrong length");
    }
    for (i32 u = 0; u < model_.pairs; ++u) {
      if (policy.level[u] < 0 || policy.level[u] >= model_.levels(u)) {
        throw py::value_error("policy: a level is out of range");
      }
    }
    if (shortage()) throw py::value_error("a microbatch does not fit alone");
  }

  Model model_;
  bool in_order_;
  std::vector<Alone> alone_;
};

// A plan that was read from its bytes; Python sees rows of numbers when it asks for them.
class PackedPlan {
 public:
  explicit PackedPlan(Plan plan) : plan_(std::move(plan)) {}

  static std::optional<PackedPlan> read(const py::bytes& data) {
    const std::string_view view(data);
    py::gil_scoped_release release;
    std::optional<Plan> plan = read_plan(view);
    if (!plan) return std::nullopt;
    return PackedPlan(std::move(*plan));
  }

  std::optional<std::vector<i64>> peaks() const {
    py::gil_scoped_release release;
    return check_plan(plan_);
  }

  py::list passes() const {
    py::list rows;
    for (const PlanPass& one : plan_.passes) {
      rows.append(py::make_tuple(one.microbatch, plan_.modules[one.module], one.sub, one.stages,
                                 one.after, one.frozen, one.item_start, one.item_stop,
                                 py::tuple(py::cast(one.hidden_shape)),
                                 py::tuple(py::cast(one.output_shape))));
    }
    return rows;
  }

  py::tuple message(std::size_t index) const {
    const PlanMessage& one = plan_.messages.at(index);
    return py::make_tuple(row(one.source), row(one.target), one.source_rank, one.target_rank,
                          one.sequence, py::tuple(py::cast(one.shape)), kElementTypes[one.dtype]);
  }

  // Of a compute action (kind, op, strategy, bytes), of a transfer (kind, message, ...).
  py::list actions(std::size_t rank) const {
    py::list strategies;
    for (const std::string& name : plan_.strategies) strategies.append(name);
    py::list rows;
    for (const PlanAction& one : plan_.actions.at(rank)) {
      if (is_compute(one.kind)) {
        rows.append(py::make_tuple(one.kind, row(one.op), strategies[one.strategy], one.memory));
        continue;
      }
      py::tuple moved(one.end - one.begin);
      for (i32 m = one.begin; m < one.end; ++m) moved[m - one.begin] = plan_.moved[m];
      rows.append(py::make_tuple(one.kind, moved));
    }
    return rows;
  }

  const Plan& plan() const { return plan_; }

 private:
  static py::tuple row(const NamedOp& op) { return py::make_tuple(op.kind, op.pass, op.stage); }

  Plan plan_;
};

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native core of the schedule search.";

  py::class_<RawProblem>(module, "RawProblem")
      .def(py::init<>())
      .def_readwrite("ranks", &RawProblem::ranks)
      .def_readwrite("microbatches", &RawProblem::microbatches)
      .def_readwrite("capacity", &RawProblem::capacity)
      .def_readwrite("pass_microbatch", &RawProblem::pass_microbatch)
      .def_readwrite("pass_module", &RawProblem::pass_module)
      .def_readwrite("pass_sub", &RawProblem::pass_sub)
      .def_readwrite("pass_stages", &RawProblem::pass_stages)
      .def_readwrite("pass_latency", &RawProblem::pass_latency)
      .def_readwrite("pass_frozen", &RawProblem::pass_frozen)
      .def_readwrite("producer_begin", &RawProblem::producer_begin)
      .def_readwrite("producers", &RawProblem::producers)
      .def_readwrite("strategy_begin", &RawProblem::strategy_begin)
      .def_readwrite("forward", &RawProblem::forward)
      .def_readwrite("backward", &RawProblem::backward)
      .def_readwrite("weight", &RawProblem::weight)
      .def_readwrite("memory", &RawProblem::memory);

  py::class_<Policy>(module, "Policy")
      .def(py::init<>())
      .def_readwrite("key", &Policy::key)
      .def_readwrite("level", &Policy::level)
      .def_readwrite("load", &Policy::load)
      .def_readwrite("release", &Policy::release)
      .def_readwrite("load_limit", &Policy::load_limit)
      .def_readwrite("split", &Policy::split)
      .def_readwrite("alternate", &Policy::alternate)
      .def_readwrite("adaptive", &Policy::adaptive)
      .def_readwrite("in_order", &Policy::in_order)
      .def_readwrite("patience", &Policy::patience)
      .def_readwrite("hold", &Policy::hold);

  py::class_<Timetable>(module, "Timetable")
      .def_readonly("makespan", &Timetable::makespan)
      .def_readonly("order", &Timetable::order)
      .def_readonly("start", &Timetable::start)
      .def_readonly("end", &Timetable::end)
      .def_readonly("level", &Timetable::level)
      .def_readonly("split", &Timetable::split);

  py::class_<Bounds>(module, "Bounds")
      .def_readonly("critical_path", &Bounds::critical_path)
      .def_readonly("jackson", &Bounds::jackson)
      .def_readonly("time_memory", &Bounds::time_memory);

  py::class_<KnapsackChoice>(module, "KnapsackChoice")
      .def_readonly("feasible", &KnapsackChoice::feasible)
      .def_readonly("chosen", &KnapsackChoice::chosen)
      .def_readonly("latency", &KnapsackChoice::latency)
      .def_readonly("bound", &KnapsackChoice::bound);

  module.def(
      "choose_candidates",
      [](std::vector<i32> begin, std::vector<i32> until, std::vector<i32> candidate_begin,
         std::vector<i64> latency, std::vector<i64> memory, i64 capacity, double gap, i32 rounds) {
        const Knapsack knapsack{std::move(begin),   std::move(until),  std::move(candidate_begin),
                                std::move(latency), std::move(memory), capacity};
        py::gil_scoped_release release;
        return choose_candidates(knapsack, gap, rounds);
      },
      py::arg("begin"), py::arg("until"), py::arg("candidate_begin"), py::arg("latency"),
      py::arg("memory"), py::arg("capacity"), py::arg("gap"), py::arg("rounds"));

  py::class_<Stop, std::shared_ptr<Stop>>(module, "Stop")
      .def(py::init<>())
      .def("request", &Stop::request)
      .def_property_readonly("requested", &Stop::requested);

  py::class_<SearchOptions>(module, "SearchOptions")
      .def(py::init<>())
      .def_readwrite("budget_ns", &SearchOptions::budget_ns)
      .def_readwrite("threads", &SearchOptions::threads)
      .def_readwrite("seed", &SearchOptions::seed)
      .def_readwrite("max_rounds", &SearchOptions::max_rounds)
      .def_readwrite("split", &SearchOptions::split)
      .def_readwrite("in_order", &SearchOptions::in_order)
      .def_readwrite("choose_memory", &SearchOptions::choose_memory)
      .def_readwrite("exploration", &SearchOptions::exploration)
      .def_readwrite("tree_alpha", &SearchOptions::tree_alpha)
      .def_readwrite("tree_beta", &SearchOptions::tree_beta)
      .def_readwrite("alternate", &SearchOptions::alternate)
      .def_readwrite("grouped", &SearchOptions::grouped)
      .def_property(
          "stop", [](const SearchOptions& options) { return options.stop; },
          [](SearchOptions& options, std::shared_ptr<Stop> stop) {
            options.stop = std::move(stop);
          });

  py::class_<SearchOutcome>(module, "SearchOutcome")
      .def_readonly("best", &SearchOutcome::best)
      .def_readonly("evaluations", &SearchOutcome::evaluations)
      .def_readonly("found_ns", &SearchOutcome::found_ns)
      .def_readonly("rounds", &SearchOutcome::rounds)
      .def_readonly("thread", &SearchOutcome::thread);

  py::class_<PackedPlan>(module, "PackedPlan")
      .def_static("read", &PackedPlan::read, py::arg("data"))
      .def("peaks", &PackedPlan::peaks)
      .def("passes", &PackedPlan::passes)
      .def("message", &PackedPlan::message, py::arg("index"))
      .def("actions", &PackedPlan::actions, py::arg("rank"))
      .def("action_count", [](const PackedPlan& one,
                              std::size_t rank) { return one.plan().actions.at(rank).size(); })
      .def_property_readonly("message_count",
                             [](const PackedPlan& one) { return one.plan().messages.size(); })
      .def_property_readonly("modules", [](const PackedPlan& one) { return one.plan().modules; })
      .def_property_readonly("segments", [](const PackedPlan& one) { return one.plan().segments; })
      .def_property_readonly("capacity", [](const PackedPlan& one) { return one.plan().capacity; })
      .def_property_readonly("forward_only",
                             [](const PackedPlan& one) { return one.plan().forward_only; })
      .def_property_readonly("makespan", [](const PackedPlan& one) { return one.plan().makespan; });

  py::class_<Core>(module, "Core")
      .def(py::init<const RawProblem&, bool>(), py::arg("raw"), py::arg("in_order"))
      .def("shortage", &Core::shortage)
      .def("bounds", [](const Core& core) { return lower_bounds(core.model()); })
      .def("decode", &Core::decode, py::arg("policy"))
      .def("retime", &Core::retime, py::arg("order"), py::arg("level"), py::arg("split"))
      .def("search", &Core::run_search, py::arg("options"), py::arg("start"), py::arg("listener"))
      .def("refill", &Core::refill, py::arg("table"), py::arg("keep"))
      .def("improve", &Core::improve, py::arg("table"), py::arg("moves"), py::arg("seed"),
           py::arg("warmth"))
      .def("latest",
           [](const Core& core, const Timetable& table) {
             std::vector<i64> start;
             Timer(core.model()).latest(table, start);
             return start;
           })
      .def("peak_memory", [](const Core& core,
                             const Timetable& table) { return peak_memory(core.model(), table); })
      .def_property_readonly("level_begin",
                             [](const Core& core) { return core.model().level_begin; })
      .def_property_readonly("strategy", [](const Core& core) { return core.model().strategy; })
      .def_property_readonly("pair_begin",
                             [](const Core& core) { return core.model().pass_begin; });
}
