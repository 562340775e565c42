"""Compiled plans are valid and survive their grid; no mutant of one passes and then fails to run.

The oracle is a plan run action by action over channels that behave like gloo and NCCL at once:
the n-th send of a directed rank pair meets the n-th receive and must carry its number.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.compiler.check import check_schedule
from megatron_pipeweaver.compiler.grid import format_actions, parse_actions
from megatron_pipeweaver.compiler.lowering import Windows
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import PlanInvalidError
from megatron_pipeweaver.ir.plan import (
    Action,
    ActionKind,
    ComputeAction,
    Message,
    Plan,
    TransferAction,
)
from megatron_pipeweaver.ir.plan_codec import plan_from_json, plan_to_json
from megatron_pipeweaver.ir.problem import OpKind, dependencies
from tests.unit.compiler.samples import draw_sample

SEEDS = st.integers(0, 2**32 - 1)
WINDOWS = (None, Windows(receive=0, send=0), Windows(receive=1000, send=1000))


def _draw(seed: int) -> tuple[random.Random, Plan]:
    rng = random.Random(seed)
    sample = draw_sample(rng)
    return rng, sample.plan(forward_only=rng.random() < 0.2, windows=rng.choice(WINDOWS))


@given(SEEDS)
@settings(max_examples=120, deadline=None)
def test_compiled_plans_are_valid_run_and_read_back(seed: int) -> None:
    rng = random.Random(seed)
    sample = draw_sample(rng)
    check_schedule(sample.problem, sample.schedule)
    for forward_only in (False, True):
        plan = sample.plan(forward_only=forward_only, windows=rng.choice(WINDOWS))
        assert verify(plan).plan is plan
        assert _runs(plan, rng)
        assert parse_actions(format_actions(plan), plan) == plan
        assert plan_from_json(plan_to_json(plan)) == plan


# --- mutants -------------------------------------------------------------------------------------

Mutator = Callable[[random.Random, Plan], Plan | None]


def _edit(plan: Plan, rank: int, edit: Callable[[list[Action]], None]) -> Plan:
    row = list(plan.ranks[rank])
    edit(row)
    return replace(plan, ranks=(*plan.ranks[:rank], tuple(row), *plan.ranks[rank + 1 :]))


def _place(rng: random.Random, plan: Plan) -> tuple[int, int]:
    rank = rng.choice([rank for rank, row in enumerate(plan.ranks) if row])
    return rank, rng.randrange(len(plan.ranks[rank]))


def _drop(rng: random.Random, plan: Plan) -> Plan:
    rank, index = _place(rng, plan)
    action = plan.ranks[rank][index]
    if isinstance(action, ComputeAction) and action.op.kind is OpKind.W:
        return replace(plan, ranks=())  # a plan without a W is another good plan
    return _edit(plan, rank, lambda row: row.pop(index))


def _duplicate(rng: random.Random, plan: Plan) -> Plan:
    rank, index = _place(rng, plan)
    to = rng.randrange(len(plan.ranks[rank]) + 1)
    return _edit(plan, rank, lambda row: row.insert(to, row[index]))


def _move_to_another_rank(rng: random.Random, plan: Plan) -> Plan | None:
    if plan.pipeline_size == 1:
        return None
    rank, index = _place(rng, plan)
    other = rng.choice([one for one in range(plan.pipeline_size) if one != rank])
    action = plan.ranks[rank][index]
    plan = _edit(plan, rank, lambda row: row.pop(index))
    return _edit(plan, other, lambda row: row.insert(rng.randint(0, len(row)), action))


def _redirect_action(rng: random.Random, plan: Plan) -> Plan | None:
    """An action now speaks of another message, or another op."""
    rank, index = _place(rng, plan)
    action = plan.ranks[rank][index]
    changed: Action
    if isinstance(action, TransferAction):
        others = [one for one in range(-1, len(plan.messages) + 1) if one != action.message]
        changed = replace(action, message=rng.choice(others))
    else:
        ops = [one.op for row in plan.ranks for one in row if isinstance(one, ComputeAction)]
        others_ops = [op for op in ops if op != action.op]
        if not others_ops:
            return None
        changed = replace(action, op=rng.choice(others_ops))
    return _edit(plan, rank, lambda row: row.__setitem__(index, changed))


def _change_kind(rng: random.Random, plan: Plan) -> Plan:
    rank, index = _place(rng, plan)
    action = plan.ranks[rank][index]
    kind = rng.choice([one for one in ActionKind if one is not action.kind])
    return _edit(plan, rank, lambda row: row.__setitem__(index, replace(action, kind=kind)))


def _change_message(change: Callable[[random.Random, Plan, Message], Message | None]) -> Mutator:
    def mutate(rng: random.Random, plan: Plan) -> Plan | None:
        if not plan.messages:
            return None
        index = rng.randrange(len(plan.messages))
        changed = change(rng, plan, plan.messages[index])
        if changed is None or changed == plan.messages[index]:
            return None
        messages = (*plan.messages[:index], changed, *plan.messages[index + 1 :])
        return replace(plan, messages=messages)

    return mutate


@_change_message
def _reshape(rng: random.Random, plan: Plan, message: Message) -> Message:
    axis = rng.randrange(len(message.shape))
    shape = list(message.shape)
    shape[axis] += 1
    return replace(message, shape=rng.choice([tuple(shape), message.shape[1:]]))


@_change_message
def _repeer(rng: random.Random, plan: Plan, message: Message) -> Message:
    end = rng.choice(["source_rank", "target_rank"])
    others = [rank for rank in range(plan.pipeline_size + 1) if rank != getattr(message, end)]
    return replace(message, **{end: rng.choice(others)})


@_change_message
def _renumber(rng: random.Random, plan: Plan, message: Message) -> Message:
    return replace(message, sequence=message.sequence + rng.choice([-1, 1, 2]))


@_change_message
def _retarget(rng: random.Random, plan: Plan, message: Message) -> Message:
    ops = [one.op for row in plan.ranks for one in row if isinstance(one, ComputeAction)]
    return replace(message, **{rng.choice(["source", "target"]): rng.choice(ops)})


@_change_message
def _retype(rng: random.Random, plan: Plan, message: Message) -> Message:
    return replace(message, dtype="int3")


def _less_memory(rng: random.Random, plan: Plan) -> Plan | None:
    ranks = [rank for rank, size in enumerate(plan.memory_capacity_bytes) if size]
    if plan.forward_only or not ranks:  # forwards alone need less than the schedule's peak
        return None
    rank = rng.choice(ranks)
    capacity = list(plan.memory_capacity_bytes)
    capacity[rank] -= 1
    return replace(plan, memory_capacity_bytes=tuple(capacity))


def _other_strategy(rng: random.Random, plan: Plan) -> Plan | None:
    pairs = [
        (rank, index)
        for rank, row in enumerate(plan.ranks)
        for index, one in enumerate(row)
        if isinstance(one, ComputeAction) and one.op.kind is not OpKind.F
    ]
    if not pairs:
        return None
    rank, index = rng.choice(pairs)
    action = plan.ranks[rank][index]
    assert isinstance(action, ComputeAction)
    changed = rng.choice(
        [replace(action, strategy="?"), replace(action, memory_bytes=action.memory_bytes + 1)]
    )
    return _edit(plan, rank, lambda row: row.__setitem__(index, changed))


def _drop_message(rng: random.Random, plan: Plan) -> Plan | None:
    return replace(plan, messages=plan.messages[:-1]) if plan.messages else None


def _drop_pass(rng: random.Random, plan: Plan) -> Plan:
    index = rng.randrange(len(plan.passes))
    return replace(plan, passes=plan.passes[:index] + plan.passes[index + 1 :])


ALWAYS_WRONG: Mapping[str, Mutator] = {
    "drop": _drop,
    "duplicate": _duplicate,
    "move to another rank": _move_to_another_rank,
    "redirect": _redirect_action,
    "change kind": _change_kind,
    "reshape": _reshape,
    "re-peer": _repeer,
    "renumber": _renumber,
    "retarget": _retarget,
    "retype": _retype,
    "less memory": _less_memory,
    "other strategy": _other_strategy,
    "drop message": _drop_message,
    "drop pass": _drop_pass,
}


@pytest.mark.parametrize("kind", ALWAYS_WRONG)
@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_every_mutant_of_these_kinds_is_refused(kind: str, seed: int) -> None:
    rng, plan = _draw(seed)
    for _ in range(4):
        mutant = ALWAYS_WRONG[kind](rng, plan)
        if mutant is None:
            continue
        with pytest.raises(PlanInvalidError):
            verify(mutant)


def _harmful_swaps(plan: Plan) -> Iterator[tuple[int, int, int]]:
    """(rank, index, index) of actions that must not change places."""
    graph = plan.graph()
    for rank, row in enumerate(plan.ranks):
        ops = {one.op: i for i, one in enumerate(row) if isinstance(one, ComputeAction)}
        transfers = {
            (one.kind, one.message): i
            for i, one in enumerate(row)
            if isinstance(one, TransferAction)
        }
        for op, index in ops.items():
            for wait in dependencies(graph, op):
                if wait.op in ops:
                    yield rank, ops[wait.op], index
        posts: defaultdict[tuple[ActionKind, int], list[int]] = defaultdict(list)
        for (kind, number), index in transfers.items():
            message = plan.messages[number]
            if kind is ActionKind.ISEND:
                yield rank, ops[message.source], index
                yield rank, index, transfers[ActionKind.WAIT_ISEND, number]
                posts[kind, message.target_rank].append(index)
            if kind is ActionKind.IRECV:
                yield rank, index, transfers[ActionKind.WAIT_IRECV, number]
                posts[kind, message.source_rank].append(index)
            if kind is ActionKind.WAIT_IRECV:
                yield rank, index, ops[message.target]
        for indices in posts.values():
            yield from ((rank, one, two) for one, two in pairwise(indices))


def _swap(plan: Plan, rank: int, one: int, two: int) -> Plan:
    def edit(row: list[Action]) -> None:
        row[one], row[two] = row[two], row[one]

    return _edit(plan, rank, edit)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_harmful_swaps_are_refused_and_others_only_pass_if_they_run(seed: int) -> None:
    rng, plan = _draw(seed)
    harmful = list(_harmful_swaps(plan))
    for rank, one, two in rng.sample(harmful, min(6, len(harmful))):
        with pytest.raises(PlanInvalidError):
            verify(_swap(plan, rank, one, two))
    for _ in range(6):
        rank, one = _place(rng, plan)
        mutant = _swap(plan, rank, one, rng.randrange(len(plan.ranks[rank])))
        try:
            verify(mutant)
        except PlanInvalidError:
            continue
        assert _runs(mutant, rng)


# --- the oracle ----------------------------------------------------------------------------------


def _runs(plan: Plan, rng: random.Random) -> bool:
    """Whether `plan` runs to its end in a random order of ranks with every tensor in place."""
    graph = plan.graph()
    sent: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    received: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    at = [0] * plan.pipeline_size
    have: list[set[object]] = [set() for _ in plan.ranks]

    def step(rank: int) -> bool:
        action = plan.ranks[rank][at[rank]]
        if isinstance(action, ComputeAction):
            for wait in dependencies(graph, action.op):
                assert wait.op in have[rank], (action, wait)
            have[rank].add(action.op)
            return True
        message = plan.messages[action.message]
        pair = message.source_rank, message.target_rank
        if action.kind is ActionKind.ISEND:
            assert message.source in have[rank]
            sent[pair].append(action.message)
        elif action.kind is ActionKind.IRECV:
            received[pair].append(action.message)
        elif action.kind is ActionKind.WAIT_ISEND:
            place = sent[pair].index(action.message)
            return len(received[pair]) > place
        else:
            place = received[pair].index(action.message)
            if len(sent[pair]) <= place:
                return False
            assert sent[pair][place] == action.message == received[pair][place]
            have[rank].add(message.source)
        return True

    while True:
        ranks = [rank for rank, row in enumerate(plan.ranks) if at[rank] < len(row)]
        rng.shuffle(ranks)
        for rank in ranks:
            if step(rank):
                at[rank] += 1
                break
        else:
            return not ranks
