"""Compiled plans are valid and survive their grid; no mutant of one passes and then fails to run.

The oracle is a plan run action by action over channels that behave like gloo and NCCL at once:
the n-th send of a directed rank pair meets the n-th receive and must carry its number, and of
messages that are posted as one none is through before all are.
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
from tests.unit.compiler.judge import judged as verify
from tests.unit.compiler.samples import draw_sample

SEEDS = st.integers(0, 2**32 - 1)
WINDOWS = (
    None,
    Windows(receive=0, send=0),
    Windows(receive=1000, send=1000),
    Windows(receive=2, group=1),
    Windows(receive=1000, group=1000),
)


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
        others = [one for one in range(-1, len(plan.messages) + 1) if one not in action.messages]
        at = rng.randrange(len(action.messages))
        messages = (*action.messages[:at], rng.choice(others), *action.messages[at + 1 :])
        changed = replace(action, messages=messages)
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


# --- groups ---


def _posts(plan: Plan) -> list[tuple[int, int, TransferAction]]:
    """Where each post stands, and what it is."""
    return [
        (rank, index, one)
        for rank, row in enumerate(plan.ranks)
        for index, one in enumerate(row)
        if isinstance(one, TransferAction) and one.kind in (ActionKind.ISEND, ActionKind.IRECV)
    ]


def _regroup(plan: Plan, rank: int, index: int, *groups: tuple[int, ...]) -> Plan:
    """The post there gives way to one post for each of `groups`."""
    action = plan.ranks[rank][index]
    posts = [replace(action, messages=one) for one in groups]
    return _edit(plan, rank, lambda row: row.__setitem__(slice(index, index + 1), posts))


def _split_one_end(rng: random.Random, plan: Plan) -> Plan | None:
    """One end posts a group as one, the other does not."""
    groups = [one for one in _posts(plan) if len(one[2].messages) > 1]
    if not groups:
        return None
    rank, index, action = rng.choice(groups)
    cut = rng.randrange(1, len(action.messages))
    return _regroup(plan, rank, index, action.messages[:cut], action.messages[cut:])


def _shuffle_group(rng: random.Random, plan: Plan) -> Plan | None:
    """Both ends post a group in the same wrong order."""
    groups = [one for one in _posts(plan) if len(one[2].messages) > 1]
    if not groups:
        return None
    messages = rng.choice(groups)[2].messages
    for rank, index, action in groups:
        if action.messages == messages:
            plan = _regroup(plan, rank, index, messages[::-1])
    return plan


def _join(plan: Plan, one: int, other: int) -> Plan:
    """The groups of two messages become one, posted where the later one stood, on both ends."""
    places: defaultdict[tuple[int, ActionKind], list[tuple[int, TransferAction]]]
    places = defaultdict(list)
    for rank, index, action in _posts(plan):
        if one in action.messages or other in action.messages:
            places[rank, action.kind].append((index, action))
    for (rank, _), found in places.items():
        if len(found) == 2:
            (first, earlier), (second, later) = found
            joined = (*earlier.messages, *later.messages)
            plan = _regroup(plan, rank, second, joined)
            plan = _edit(plan, rank, lambda row, first=first: row.pop(first))  # type: ignore[misc]
    return plan


def _neighbours(plan: Plan) -> list[tuple[int, int]]:
    """Messages that follow each other between two ranks, in different groups."""
    pairs: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, message in enumerate(plan.messages):
        pairs[message.source_rank, message.target_rank].append(index)
    together = {pair for _, _, action in _posts(plan) for pair in pairwise(action.messages)}
    return [two for found in pairs.values() for two in pairwise(found) if two not in together]


def _group_of_two_pairs(rng: random.Random, plan: Plan) -> Plan | None:
    """Messages of several rank pairs are posted as one."""
    kind = rng.choice([ActionKind.ISEND, ActionKind.IRECV])
    rows = [
        [p for p in _posts(plan) if p[0] == r and p[2].kind is kind] for r in range(len(plan.ranks))
    ]
    both = [
        (one, two)
        for row in rows
        for one, two in pairwise(row)
        if _ends(plan, one[2]) != _ends(plan, two[2])
    ]
    if not both:
        return None
    (rank, first, one), (_, second, two) = rng.choice(both)
    plan = _regroup(plan, rank, second, (*one.messages, *two.messages))
    return _edit(plan, rank, lambda row: row.pop(first))


def _ends(plan: Plan, action: TransferAction) -> tuple[int, int]:
    message = plan.messages[action.messages[0]]
    return message.source_rank, message.target_rank


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
    "split a group at one end": _split_one_end,
    "shuffle a group": _shuffle_group,
    "group of two rank pairs": _group_of_two_pairs,
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
            (one.kind, message): i
            for i, one in enumerate(row)
            if isinstance(one, TransferAction)
            for message in one.messages
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
            yield from ((rank, one, two) for one, two in pairwise(indices) if one != two)


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


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_groups_pass_only_if_they_run(seed: int) -> None:
    rng, plan = _draw(seed)
    neighbours = _neighbours(plan)
    for one, other in rng.sample(neighbours, min(6, len(neighbours))):
        mutant = _join(plan, one, other)
        try:
            verify(mutant)
        except PlanInvalidError:
            continue
        assert _runs(mutant, rng)


def test_groups_that_deadlock_are_refused_as_rings() -> None:
    rings = passed = 0
    for seed in range(25):
        plan = draw_sample(random.Random(seed)).plan()
        for one, other in _neighbours(plan):
            mutant = _join(plan, one, other)
            try:
                verify(mutant)
            except PlanInvalidError as error:
                if "wait for each other in a ring" in str(error):
                    rings += 1
                    assert not _runs(mutant, random.Random(0))
            else:
                passed += 1
    assert rings > 10
    assert passed > 10


# --- the oracle ----------------------------------------------------------------------------------


def _runs(plan: Plan, rng: random.Random) -> bool:
    """Whether `plan` runs to its end in a random order of ranks with every tensor in place."""
    graph = plan.graph()
    sent: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    received: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    group = {
        (action.kind, number): action.messages
        for _, _, action in _posts(plan)
        for number in action.messages
    }
    at = [0] * plan.pipeline_size
    have: list[set[object]] = [set() for _ in plan.ranks]

    def step(rank: int) -> bool:
        action = plan.ranks[rank][at[rank]]
        if isinstance(action, ComputeAction):
            for wait in dependencies(graph, action.op):
                assert wait.op in have[rank], (action, wait)
            have[rank].add(action.op)
            return True
        message = plan.messages[action.messages[0]]
        pair = message.source_rank, message.target_rank
        if action.kind is ActionKind.ISEND:
            assert all(plan.messages[one].source in have[rank] for one in action.messages)
            sent[pair].extend(action.messages)
        elif action.kind is ActionKind.IRECV:
            received[pair].extend(action.messages)
        elif action.kind is ActionKind.WAIT_ISEND:
            members = group[ActionKind.ISEND, action.messages[0]]
            return all(len(received[pair]) > sent[pair].index(one) for one in members)
        else:
            members = group[ActionKind.IRECV, action.messages[0]]
            places = [received[pair].index(one) for one in members]
            if len(sent[pair]) <= max(places):
                return False
            assert [sent[pair][place] for place in places] == list(members)
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
