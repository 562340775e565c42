// A plan as flat arrays, read from its canonical bytes (`ir/plan_codec.py`).
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model.hpp"

namespace pipeweaver {

enum ActionKind : i32 {
  kFwStage,
  kBwStage,
  kWgStage,
  kIsend,
  kIrecv,
  kWaitIsend,
  kWaitIrecv,
  kActionKinds
};
inline constexpr std::array<std::string_view, kActionKinds> kActionNames{
    "fw_stage", "bw_stage", "wg_stage", "isend", "irecv", "wait_isend", "wait_irecv"};
inline constexpr std::array<std::string_view, 4> kElementTypes{"float64", "float32", "bfloat16",
                                                               "float16"};

inline bool is_compute(i32 kind) { return kind <= kWgStage; }

// An op as a plan's bytes name it; whether the plan has it is for `check_plan` to say.
struct NamedOp {
  i32 kind = kForward;
  i32 pass = -1;
  i32 stage = 0;
};

struct PlanPass {
  i32 microbatch, module, sub;
  i32 stages;
  std::vector<i32> after;  // passes
  bool frozen;
  i64 item_start, item_stop;
  std::vector<i64> hidden_shape, output_shape;
};

struct PlanMessage {
  NamedOp source, target;
  i32 source_rank, target_rank, sequence;
  std::vector<i64> shape;
  i32 dtype;  // in `kElementTypes`
};

// Compute: `op`, `strategy`, `memory`. Transfers: messages `begin` to `end` of `Plan::moved`.
struct PlanAction {
  i32 kind;
  NamedOp op{};
  i32 strategy = -1;
  i64 memory = 0;
  i32 begin = 0, end = 0;
};

struct Plan {
  i32 ranks = 0;
  std::vector<std::string> modules;
  std::vector<i32> segments;
  bool forward_only = false;
  std::vector<i64> capacity;
  i64 makespan = 0;
  std::vector<PlanPass> passes;
  std::vector<PlanMessage> messages;
  std::vector<std::string> strategies;
  std::vector<std::vector<PlanAction>> actions;  // per rank, in order
  std::vector<i32> moved;                        // what transfers move, by message
};

// The plan in `data`; nothing where the bytes are not exactly what `plan_to_json` writes of a plan
// whose names are plain ASCII words. Then Python's reader knows what to make of them.
std::optional<Plan> read_plan(std::string_view data);

// Per rank, the most bytes that are held at any time; nothing unless the plan keeps all rules of
// `compiler/verify.py`, whose twin this is: it says yes to no plan that `verify` refuses.
std::optional<std::vector<i64>> check_plan(const Plan& plan);

}  // namespace pipeweaver
