"""Strict JSON of problems, schedules and traces (`docs/formats.md`).

Readers refuse an unknown `format`, a missing or unknown key, a wrong type, a negative or
non-integer number and a wrong length, in one line. Writers are canonical: the same value gives
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megatron_pipeweaver.ir.json_reader import JsonNode, parse_json
from megatron_pipeweaver.ir.problem import Microbatch, OpKey, OpKind, Pass, Problem, Strategy
from megatron_pipeweaver.ir.schedule import Schedule, ScheduledOp
from megatron_pipeweaver.ir.trace import Trace, TraceKind, TraceRow

PROBLEM_FORMAT = "pipeweaver.problem/1"
SCHEDULE_FORMAT = "pipeweaver.schedule/1"
TRACE_FORMAT = "pipeweaver.trace/1"

_STRATEGY_KEYS = frozenset({"name", "forward_ns", "backward_ns", "weight_grad_ns", "memory_bytes"})
_PASS_KEYS = frozenset({"module", "sub_microbatch", "after", "p2p_latency_ns", "stages"})
_OP_KEYS = frozenset({"op", "microbatch", "module", "sub_microbatch", "stage"})
_TIMED_KEYS = frozenset({"strategy", "start_ns", "end_ns"})


def digest(data: bytes) -> str:
    """SHA-256 of `data`, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def to_bytes(value: Any) -> bytes:
    """`value` as canonical JSON: compact, keys in the order given, one newline at the end."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def check_format(
    root: JsonNode, expected: str, keys: set[str], optional: set[str] | None = None
) -> JsonNode:
    """`root`, known to be an object of the `expected` format with these other `keys` alone."""
    # The format first: a file of another format should be told so, not which keys it lacks.
    found = root.get("format")
    if found is None:
        root.fail(f"key 'format' is missing; add it ({expected!r})")
    if found.text() != expected:
        found.fail(f"is {found.text()!r}; this reader takes {expected!r}")
    return root.keys(frozenset(keys | {"format"}), frozenset(optional or ()))


# --- problem -------------------------------------------------------------------------------------


def problem_from_json(data: bytes, source: str = "problem") -> Problem:
    """The problem in the file bytes `data`; `source` names the file in errors.

    Raises:
        ConfigError: the bytes are not a valid `pipeweaver.problem/1`.
    """
    root = check_format(
        parse_json(data, source),
        PROBLEM_FORMAT,
        {"pipeline_size", "memory_capacity_bytes", "modules", "microbatches"},
    )
    pipeline_size = root["pipeline_size"].integer(minimum=1)
    capacities = root["memory_capacity_bytes"].array(pipeline_size)
    modules = {
        name: node.keys(frozenset({"segments"}))["segments"].integer(minimum=1)
        for name, node in root["modules"].entries()
    }
    microbatches = tuple(
        Microbatch(
            passes=tuple(
                _read_pass(node, pipeline_size, modules)
                for node in entry.keys(frozenset({"passes"}))["passes"].array()
            )
        )
        for entry in root["microbatches"].array()
    )
    return root["microbatches"].build(
        Problem,
        pipeline_size=pipeline_size,
        memory_capacity_bytes=tuple(node.integer() for node in capacities),
        modules=modules,
        microbatches=microbatches,
    )


def _read_pass(node: JsonNode, pipeline_size: int, modules: dict[str, int]) -> Pass:
    node.keys(_PASS_KEYS, optional=frozenset({"frozen"}))
    module = node["module"].text()
    if module not in modules:
        node["module"].fail(f"is {module!r}; `modules` has {sorted(modules)}")
    stages = node["stages"].array(pipeline_size * modules[module])
    frozen = node.get("frozen")
    after = tuple(
        (name.text(), index.integer())
        for name, index in (entry.array(2) for entry in node["after"].array())
    )
    return node.build(
        Pass,
        module=module,
        sub_microbatch=node["sub_microbatch"].integer(),
        after=after,
        p2p_latency_ns=node["p2p_latency_ns"].integer(),
        stages=tuple(_read_stage(stage) for stage in stages),
        frozen=frozen is not None and frozen.boolean(),
    )


def _read_stage(node: JsonNode) -> tuple[Strategy, ...]:
    candidates = node.keys(frozenset({"strategies"}))["strategies"].array()
    return tuple(
        one.build(
            Strategy,
            name=one["name"].text(),
            forward_ns=one["forward_ns"].integer(),
            backward_ns=one["backward_ns"].integer(),
            weight_grad_ns=one["weight_grad_ns"].integer(),
            memory_bytes=one["memory_bytes"].integer(),
        )
        for one in (candidate.keys(_STRATEGY_KEYS) for candidate in candidates)
    )


def problem_to_json(problem: Problem) -> bytes:
    """`problem` as file bytes."""
    return to_bytes(
        {
            "format": PROBLEM_FORMAT,
            "pipeline_size": problem.pipeline_size,
            "memory_capacity_bytes": list(problem.memory_capacity_bytes),
            "modules": {name: {"segments": n} for name, n in problem.modules.items()},
            "microbatches": [
                {"passes": [_pass_to_json(one) for one in microbatch.passes]}
                for microbatch in problem.microbatches
            ],
        }
    )


def _pass_to_json(one: Pass) -> dict[str, Any]:
    return {
        "module": one.module,
        "sub_microbatch": one.sub_microbatch,
        "after": [list(name) for name in one.after],
        "p2p_latency_ns": one.p2p_latency_ns,
        "stages": [
            {
                "strategies": [
                    {key: getattr(strategy, key) for key in Strategy.__slots__}
                    for strategy in strategies
                ]
            }
            for strategies in one.stages
        ],
        **({"frozen": True} if one.frozen else {}),
    }


# --- schedule ------------------------------------------------------------------------------------


def op_fields(node: JsonNode) -> OpKey:
    """The op named by the `op`, `microbatch`, `module`, `sub_microbatch`, `stage` of `node`."""
    kind = node["op"].text()
    if kind not in OpKind.__members__:
        node["op"].fail(f"is {kind!r}; it must be F, B or W")
    return OpKey(
        OpKind(kind),
        node["microbatch"].integer(),
        node["module"].text(),
        node["sub_microbatch"].integer(),
        node["stage"].integer(),
    )


def op_to_json(key: OpKey) -> dict[str, Any]:
    """The five fields that name an op in schedules and traces."""
    return {
        "op": key.kind.value,
        "microbatch": key.microbatch,
        "module": key.module,
        "sub_microbatch": key.sub_microbatch,
        "stage": key.stage,
    }


def schedule_from_json(data: bytes, source: str = "schedule") -> Schedule:
    """The schedule in the file bytes `data`; it is read, not checked against a problem.

    Raises:
        ConfigError: the bytes are not a valid `pipeweaver.schedule/1`.
    """
    root = check_format(
        parse_json(data, source),
        SCHEDULE_FORMAT,
        {"problem_sha256", "makespan_ns", "lower_bound_ns", "peak_memory_bytes", "ranks"},
    )
    ranks = root["ranks"].array()
    peaks = root["peak_memory_bytes"].array(len(ranks))
    return Schedule(
        problem_sha256=root["problem_sha256"].text(),
        makespan_ns=root["makespan_ns"].integer(),
        lower_bound_ns=root["lower_bound_ns"].integer(),
        peak_memory_bytes=tuple(node.integer() for node in peaks),
        ranks=tuple(
            tuple(
                ScheduledOp(
                    key=op_fields(row.keys(_OP_KEYS | _TIMED_KEYS)),
                    strategy=row["strategy"].text(),
                    start_ns=row["start_ns"].integer(),
                    end_ns=row["end_ns"].integer(),
                )
                for row in rank.array()
            )
            for rank in ranks
        ),
    )


def schedule_to_json(schedule: Schedule) -> bytes:
    """`schedule` as file bytes."""
    return to_bytes(
        {
            "format": SCHEDULE_FORMAT,
            "problem_sha256": schedule.problem_sha256,
            "makespan_ns": schedule.makespan_ns,
            "lower_bound_ns": schedule.lower_bound_ns,
            "peak_memory_bytes": list(schedule.peak_memory_bytes),
            "ranks": [
                [
                    {
                        **op_to_json(op.key),
                        "strategy": op.strategy,
                        "start_ns": op.start_ns,
                        "end_ns": op.end_ns,
                    }
                    for op in rank
                ]
                for rank in schedule.ranks
            ],
        }
    )


# --- trace ---------------------------------------------------------------------------------------


def trace_from_json(data: bytes, source: str = "trace") -> Trace:
    """The trace in the file bytes `data`.

    Raises:
        ConfigError: the bytes are not a valid `pipeweaver.trace/1`.
    """
    root = check_format(
        parse_json(data, source), TRACE_FORMAT, {"iteration", "plan_sha256", "hosts", "ranks"}
    )
    ranks = root["ranks"].array()
    return Trace(
        iteration=root["iteration"].integer(),
        plan_sha256=root["plan_sha256"].text(),
        hosts=tuple(node.text() for node in root["hosts"].array(len(ranks))),
        ranks=tuple(tuple(_read_trace_row(row) for row in rank.array()) for rank in ranks),
    )


def _read_trace_row(node: JsonNode) -> TraceRow:
    node.keys(_OP_KEYS | _TIMED_KEYS | {"kind"}, optional=frozenset({"peer", "bytes"}))
    kind = node["kind"].text()
    if kind not in [one.value for one in TraceKind]:
        node["kind"].fail(f"is {kind!r}; it must be one of {[one.value for one in TraceKind]}")
    peer, size = node.get("peer"), node.get("bytes")
    return TraceRow(
        kind=TraceKind(kind),
        key=op_fields(node),
        strategy=node["strategy"].text(),
        start_ns=node["start_ns"].integer(),
        end_ns=node["end_ns"].integer(),
        peer=None if peer is None else peer.integer(),
        size_bytes=None if size is None else size.integer(),
    )


def trace_to_json(trace: Trace) -> bytes:
    """`trace` as file bytes."""
    return to_bytes(
        {
            "format": TRACE_FORMAT,
            "iteration": trace.iteration,
            "plan_sha256": trace.plan_sha256,
            "hosts": list(trace.hosts),
            "ranks": [[_trace_row_to_json(row) for row in rank] for rank in trace.ranks],
        }
    )


def _trace_row_to_json(row: TraceRow) -> dict[str, Any]:
    return {
        **op_to_json(row.key),
        "strategy": row.strategy,
        "start_ns": row.start_ns,
        "end_ns": row.end_ns,
        "kind": row.kind.value,
        **({} if row.peer is None else {"peer": row.peer}),
        **({} if row.size_bytes is None else {"bytes": row.size_bytes}),
    }
