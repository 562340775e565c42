"""Micro-benchmarks of collectives between the ranks of one job, as `torchrun` starts them.

    torchrun --nproc-per-node 8 -m megatron_pipeweaver calibrate --device cuda --base H100 -o FILE

Every rank runs the same calls, sizes and collectives in another order every round; of each rank's
medians the slowest counts. A first call behind each barrier is not timed: it takes as long as the
ranks are late, up to a time slice where they share cores. Only functions that measure need torch,
and import it themselves.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.calibration import Sample
from megatron_pipeweaver.semu.operators import collective_work
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Phase, Queue, Work

SIZES = (*(size for power in range(16, 24) for size in (1 << power, 3 << power - 1)), 1 << 24)
"""Bytes of the whole, unsharded tensor."""
_IN_A_ROW = 5
"""Calls behind one barrier that are timed, each on its own."""
_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


def ranks_of_job() -> int:
    """How many ranks ``torchrun`` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: str) -> Iterator[int]:
    """All ranks of the job in one group (gloo on a CPU, NCCL on GPUs); gives this one's number."""
    import torch
    import torch.distributed as dist

    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                "calibration: this machine has no CUDA device; measure the cpu instead"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(_BACKENDS[device])
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def measure_collectives(
    device: str, *, sizes: Iterable[int] = SIZES, repeats: int = 7
) -> list[Sample]:
    """Measure all collectives that SEMU emulates, in a `process_group`.

    Args:
        device: ``cpu`` or ``cuda``.
        sizes: bytes of whole tensors.
        repeats: rounds, of which the median counts.
    """
    import torch
    import torch.distributed as dist

    ranks = dist.get_world_size()
    calls = {
        (kind, 4 * elements * ranks): call
        for elements in (max(1, size // 4 // ranks) for size in sizes)
        for kind, call in _calls(torch, dist, device, elements, ranks).items()
    }
    times: dict[tuple[OperatorClass, int], list[int]] = {which: [] for which in calls}
    shuffled, source = list(calls), random.Random(0)  # the same order on all ranks
    for number in range(repeats + 1):
        source.shuffle(shuffled)
        for which in shuffled:
            found = _times_ns(torch, dist, device, calls[which])
            if number:  # the first round warms up
                times[which] += found
    medians = torch.tensor([round(statistics.median(one)) for one in times.values()], device=device)
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    return [
        Sample(operator=_operator(kind, size, ranks), times_ns={Phase.FORWARD: max(1, found)})
        for (kind, size), found in zip(times, medians.tolist(), strict=True)
    ]


def _operator(kind: OperatorClass, size_bytes: int, ranks: int) -> Operator:
    """The collective as SEMU counts it, for a whole tensor of `size_bytes`."""
    share = size_bytes // ranks
    works: Mapping[OperatorClass, Work] = {
        OperatorClass.ALL_TO_ALL: Work(
            network_bytes=share * (ranks - 1) // ranks, memory_bytes=2 * share, steps=ranks - 1
        ),
        OperatorClass.RING_EXCHANGE: Work(network_bytes=share, memory_bytes=2 * share, steps=1),
        OperatorClass.SEND: Work(network_bytes=share, memory_bytes=share, steps=1),
    }
    work = works[kind] if kind in works else collective_work(kind, size_bytes, ranks)
    return Operator(
        name=kind.value, kind=kind, inputs=(), outputs=(), forward=work, queue=Queue.TENSOR_LINK
    )


def _calls(
    torch: Any, dist: Any, device: str, elements: int, ranks: int
) -> dict[OperatorClass, Callable[[], object]]:
    """By class, a call on a share of `elements`; every rank makes the same."""
    share = torch.ones(elements, device=device)
    other = torch.empty_like(share)
    whole = torch.ones(elements * ranks, device=device)
    rank = dist.get_rank()
    # Newer versions of torch have new names for them.
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
    behind, before = (rank + 1) % ranks, (rank - 1) % ranks

    def ring() -> None:
        swap = [dist.P2POp(dist.isend, share, behind), dist.P2POp(dist.irecv, other, before)]
        for one in dist.batch_isend_irecv(swap):
            one.wait()

    def send() -> None:
        """From the first to the second rank; the others have nothing to do."""
        if rank == 0:
            dist.send(share, 1)
        elif rank == 1:
            dist.recv(other, 0)

    calls: dict[OperatorClass, Callable[[], object]] = {
        OperatorClass.ALL_REDUCE: lambda: dist.all_reduce(whole),
        OperatorClass.ALL_GATHER: lambda: gather(whole, share),
        OperatorClass.REDUCE_SCATTER: lambda: scatter(other, whole),
        OperatorClass.RING_EXCHANGE: ring,
        OperatorClass.SEND: send,
    }
    if elements % ranks == 0:
        calls[OperatorClass.ALL_TO_ALL] = lambda: dist.all_to_all_single(other, share)
    return calls


def _times_ns(torch: Any, dist: Any, device: str, call: Callable[[], object]) -> list[int]:
    """Nanoseconds of some calls in a row, when the ranks have met in one that does not count."""
    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    dist.barrier()
    times = []
    for _ in range(1 + _IN_A_ROW):
        synchronize()
        start = time.perf_counter_ns()
        call()
        synchronize()
        times.append(time.perf_counter_ns() - start)
    return times[1:]
