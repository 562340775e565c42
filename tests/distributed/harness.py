"""Runs one function on N gloo ranks, each a process of its own, under one deadline.

    def work(ctx: RankContext, count: int) -> int:
        ctx.note("about to add")          # shown for every rank if the run hangs
        ...torch.distributed is initialised, gloo on the loopback device...

    assert run_on_ranks(work, 4, 7) == [..., ..., ..., ...]

`run_on_ranks` wants every rank to return; `outcomes_of_ranks` hands back whatever each rank came
to (tests of failures). Ranks are forked from one server process that has imported torch already,
so that a run costs well under a second. The function must be importable (module level). What a
rank starts ends with the run: it stays in the rank's process group, which is killed as a whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_NOTE_BYTES = 400
_GRACE_S = 15.0
_LEAVE_S = 5.0
_PRELOAD = ["numpy", "torch", "torch.distributed", "torch.utils.checkpoint", "torch._dynamo"]


class RanksFailedError(AssertionError):
    """Some rank raised, died or hung; the message tells for every rank what is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """What the function of a rank gets as its first argument."""

    rank: int
    size: int
    directory: Path
    """Shared by all ranks of the run, and gone afterwards."""
    note: Callable[[str], None]
    """Says what this rank does next; printed when the run hangs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one rank came to: `value`, or `error` (the exception itself where it pickles)."""

    rank: int
    seconds: float
    note: str
    output: str
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    hung: bool = False
    exit_code: int | None = None

    @property
    def failed(self) -> bool:
        """True unless the function returned."""
        return self.error is not None or self.hung or self.exit_code != 0

    def describe(self) -> str:
        """The rank's story in a few lines."""
        state = "returned"
        if self.hung:
            state = f"HUNG at: {self.note or '(no note)'}"
        elif self.error is not None:
            state = f"raised {type(self.error).__name__}: {self.error}"
        elif self.exit_code:
            state = f"died with exit code {self.exit_code} at: {self.note or '(no note)'}"
        tail = "\n".join(self.output.splitlines()[-30:])
        return f"--- rank {self.rank} after {self.seconds:.1f} s {state}\n{self.trace}{tail}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    function: Callable[..., Any]
    rank: int
    size: int
    args: tuple[Any, ...]
    directory: Path
    settings: Mapping[str, str]
    initialise: bool


@dataclass(slots=True)
class _Rank:
    process: BaseProcess
    note: Any
    ended_at: float | None = None
    hung: bool = field(default=False)


def run_on_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    deadline_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
    initialise: bool = True,
) -> list[Any]:
    """`function(ctx, *args)` on `size` ranks; what each returned, by rank.

    Args:
        function: importable, e.g. at module level; what it takes and returns must pickle.
        size: world size.
        args: further arguments, the same on every rank.
        deadline_s: a run that takes longer is a hang.
        environment: variables to set in the ranks before anything else.
        initialise: call `torch.distributed.init_process_group` (gloo, rendezvous by file).

    Raises:
        RanksFailedError: any rank raised, died or hung.
    """
    outcomes = outcomes_of_ranks(
        function,
        size,
        *args,
        deadline_s=deadline_s,
        environment=environment,
        initialise=initialise,
    )
    if any(one.failed for one in outcomes):
        raise RanksFailedError("\n" + "\n".join(one.describe() for one in outcomes))
    return [one.value for one in outcomes]


def outcomes_of_ranks(
    function: Callable[..., Any],
    size: int,
    *args: Any,
    deadline_s: float = 120.0,
    grace_s: float = _GRACE_S,
    environment: Mapping[str, str] | None = None,
    initialise: bool = True,
) -> list[Outcome]:
    """As `run_on_ranks`, but hands back every rank's outcome and raises nothing.

    Once one rank has failed the others get `grace_s` more seconds, then count as hung.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        directory = Path(name)
        ranks: list[_Rank] = []
        started = time.monotonic()
        for rank in range(size):
            note = context.Array(ctypes.c_char, _NOTE_BYTES, lock=False)
            job = _Job(
                function=function,
                rank=rank,
                size=size,
                args=args,
                directory=directory,
                settings=settings,
                initialise=initialise,
            )
            process = context.Process(target=_rank_main, args=(job, note), daemon=True)
            process.start()
            ranks.append(_Rank(process=process, note=note))
        try:
            _wait(ranks, started, deadline_s, grace_s)
            return [_outcome(rank, one, directory, started) for rank, one in enumerate(ranks)]
        finally:
            _end_groups(ranks)


def _wait(ranks: Sequence[_Rank], started: float, deadline_s: float, grace_s: float) -> None:
    """Returns when every rank has ended; what outlasts its time is marked and killed."""
    deadline = started + deadline_s
    while any(one.ended_at is None for one in ranks):
        now = time.monotonic()
        for one in ranks:
            if one.ended_at is None and not one.process.is_alive():
                one.ended_at = now
                if one.process.exitcode != 0:
                    deadline = min(deadline, now + grace_s)
        if now > deadline:
            for one in ranks:
                _kill(one)
            return
        time.sleep(0.02)


def _kill(one: _Rank) -> None:
    if one.ended_at is not None or one.process.pid is None:
        return
    one.hung = True
    one.ended_at = time.monotonic()
    os.kill(one.process.pid, signal.SIGUSR1)  # faulthandler writes the stack into the rank's log
    time.sleep(0.2)
    one.process.kill()
    one.process.join()


def _end_groups(ranks: Sequence[_Rank]) -> None:
    """Kill whatever the ranks have started and left, and the ranks themselves.

    They end by `os._exit`, behind which no exit handler stops children: Megatron's checkpoints,
    say, are written beside a `multiprocessing.Manager`, which waits for ever.
    """
    for one in ranks:
        if one.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.process.pid, signal.SIGKILL)


def _outcome(rank: int, one: _Rank, directory: Path, started: float) -> Outcome:
    value: Any = None
    error: BaseException | None = None
    trace = ""
    result = directory / f"rank{rank}.result"
    exit_code = one.process.exitcode
    if result.exists():  # it had finished, and was only waiting for the others
        value, error, trace = pickle.loads(result.read_bytes())
        one.hung, exit_code = False, int(error is not None)
    log = directory / f"rank{rank}.log"
    return Outcome(
        rank=rank,
        seconds=(one.ended_at or started) - started,
        note=bytes(one.note.value).decode(errors="replace"),
        output=log.read_text(errors="replace") if log.exists() else "",
        value=value,
        error=error,
        trace=trace,
        hung=one.hung,
        exit_code=exit_code,
    )


def _rank_main(job: _Job, note: Any) -> None:
    """The life of one rank's process; ends with `os._exit` so that no group is torn down."""
    os.setpgid(0, 0)
    log = os.open(job.directory / f"rank{job.rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(job.settings)
    os.environ.update(RANK=str(job.rank), LOCAL_RANK=str(job.rank), WORLD_SIZE=str(job.size))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    faulthandler.register(signal.SIGUSR1, all_threads=True)

    def write_note(text: str) -> None:
        note.value = text.encode()[: _NOTE_BYTES - 1]

    context = RankContext(rank=job.rank, size=job.size, directory=job.directory, note=write_note)
    result: tuple[Any, BaseException | None, str]
    try:
        if job.initialise:
            _initialise(context)
        result = (job.function(context, *job.args), None, "")
    except BaseException as error:
        result = (None, _pickleable(error), traceback.format_exc())
    scratch = job.directory / f"rank{job.rank}.part"
    scratch.write_bytes(pickle.dumps(result))
    scratch.rename(job.directory / f"rank{job.rank}.result")
    sys.stdout.flush()
    sys.stderr.flush()
    if result[1] is None and job.initialise:
        _leave(context)
    os._exit(int(result[1] is not None))


def _initialise(context: RankContext) -> None:
    import torch

    torch.set_num_threads(1)
    context.note("init_process_group")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{context.directory / 'rendezvous'}",
        rank=context.rank,
        world_size=context.size,
    )
    context.note("")


def _leave(context: RankContext) -> None:
    """Waits for the other ranks' results, so that no rank's sockets close under a slower one."""
    until = time.monotonic() + _LEAVE_S
    files = [context.directory / f"rank{rank}.result" for rank in range(context.size)]
    while time.monotonic() < until and not all(file.exists() for file in files):
        time.sleep(0.01)


def _pickleable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
