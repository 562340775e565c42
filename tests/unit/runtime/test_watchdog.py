"""The watchdog: where every rank stands when one is stuck or fails, and nothing is killed."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError, TransferError
from megatron_pipeweaver.ir.plan import ActionKind, VerifiedPlan
from megatron_pipeweaver.ir.plan_text import format_action
from megatron_pipeweaver.runtime.executor import Executor
from megatron_pipeweaver.runtime.local import LocalNetwork, LocalTransport
from megatron_pipeweaver.runtime.recorder import Recorder
from megatron_pipeweaver.runtime.stage import ModuleStages, StageRunner
from megatron_pipeweaver.runtime.watchdog import StoreBoard, WatchConfig, Watchdog
from tests.distributed.toy import build_chunks, draw_plan, loss_of, stages_of

QUICK = WatchConfig(stuck_s=0.05, interval_s=0.05)


class DictBoard:
    """A board of one process; a `Board`."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}

    def write(self, rank: int, text: str) -> None:
        self.texts[rank] = text

    def read(self, rank: int) -> str | None:
        return self.texts.get(rank)


class Broken(ModuleStages):
    """Its first forward fails."""

    def forward(self, *_):
        raise ValueError("no such image")


def plan_of_two() -> VerifiedPlan:
    plans = (draw_plan(seed, pipeline_size=2) for seed in range(50))
    return next(one for one in plans if not any(each.frozen for each in one.plan.passes))


def run_rank(
    verified: VerifiedPlan,
    rank: int,
    network: LocalNetwork,
    board: DictBoard,
    *,
    stages: StageRunner | None = None,
    say: Callable[[str], None] = lambda text: None,
    config: WatchConfig = QUICK,
) -> PipeWeaverError | ValueError | None:
    watchdog = Watchdog(rank, board, config, say=say)
    stages = stages or stages_of(verified.plan, rank)[0]
    try:
        with watchdog.watching(verified.plan, 4) as at:
            recorder = Recorder(4, on_action=at)
            Executor(rank, stages, LocalTransport(network), recorder).run(verified)
    except (PipeWeaverError, ValueError) as error:
        return error
    return None


def test_a_stuck_wait_is_told_with_each_ranks_next_action_and_then_ends() -> None:
    verified = plan_of_two()
    plan = verified.plan
    said: list[str] = []
    error = run_rank(verified, 1, LocalNetwork(timeout_s=1.0), DictBoard(), say=said.append)
    assert isinstance(error, TransferError)
    first_wait = next(
        index for index, action in enumerate(plan.ranks[1]) if action.kind is ActionKind.WAIT_IRECV
    )
    place = f"rank 1, action {first_wait}: `{format_action(plan, plan.ranks[1][first_wait])}`"
    (text,) = said  # once, however long it lasts
    for told in (text, str(error)):
        assert "rank 0: has not been heard of" in told
        assert place in told
    assert text.startswith("rank 1 gets no further in iteration 4:")


def test_others_end_with_the_reason_of_the_rank_that_failed() -> None:
    verified = plan_of_two()
    plan = verified.plan
    network, board = LocalNetwork(timeout_s=2.0), DictBoard()
    broken = Broken(plan, build_chunks(plan, 1), loss_of)
    errors: dict[int, Exception | None] = {}

    def work(rank: int) -> None:
        stages = broken if rank == 1 else None
        errors[rank] = run_rank(verified, rank, network, board, stages=stages)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(errors[1], ValueError)
    assert isinstance(errors[0], TransferError)
    assert "rank 1: failed: ValueError: no such image" in str(errors[0])


def test_ranks_that_have_ended_and_older_iterations_are_told_apart() -> None:
    verified = plan_of_two()
    board = DictBoard()
    watchdog = Watchdog(0, board, QUICK)
    board.write(0, f"[4, {len(verified.plan.ranks[0])}, 0]")
    board.write(1, "[3, 7, 0]")
    assert watchdog.describe(verified.plan, 4) == (
        "rank 0: has ended the iteration\nrank 1: was last heard of in iteration 3"
    )


def test_a_board_in_a_store_reads_what_others_wrote() -> None:
    store = dist.HashStore()
    first, second = StoreBoard(store, "0"), StoreBoard(store, "0")
    assert first.read(1) is None
    second.write(1, "[1, 2, 3]")
    assert first.read(1) == "[1, 2, 3]"
    assert StoreBoard(store, "1").read(1) is None


def test_a_watchdog_without_patience_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stuck_s=0"):
        WatchConfig(stuck_s=0)
