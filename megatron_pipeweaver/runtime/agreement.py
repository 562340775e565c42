"""The same plan on every rank: bytes from one rank to all, and a check that all hold the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_pipeweaver.errors import PlanMismatchError, TransferError


def broadcast_bytes(data: bytes | None, group: dist.ProcessGroup, source: int) -> bytes:
    """The bytes that the rank `source` holds, on every rank of `group`.

    Args:
        data: the bytes on `source`; elsewhere `None`.
        group: every rank of it calls this.
        source: a global rank.

    Raises:
        TransferError: a rank of the group is gone or did not come in time.
    """
    mine = dist.get_rank() == source
    payload = data or b""
    try:
        length = torch.tensor([len(payload)], dtype=torch.int64, device=_device(group))
        dist.broadcast(length, source, group=group)
        tensor = _to_tensor(payload, group) if mine else _empty(int(length), group)
        if len(tensor):
            dist.broadcast(tensor, source, group=group)
    except RuntimeError as error:
        raise TransferError(f"broadcast of the plan from rank {source}: {error}") from error
    return _to_bytes(tensor)


def gather_bytes(data: bytes, group: dist.ProcessGroup) -> tuple[bytes, ...]:
    """Every rank's `data`, in the order of the group, on every rank of `group`.

    Raises:
        TransferError: a rank of the group is gone or did not come in time.
    """
    try:
        size = dist.get_world_size(group)
        lengths = _gather(torch.tensor([len(data)], device=_device(group)), size, group)
        longest = max(int(one) for one in lengths)
        padded = _gather(_to_tensor(data.ljust(longest, b"\0"), group), size, group)
    except RuntimeError as error:
        raise TransferError(f"gathering from {size} ranks: {error}") from error
    return tuple(_to_bytes(one)[: int(length)] for one, length in zip(padded, lengths, strict=True))


def agree(held: Mapping[str, str], group: dist.ProcessGroup, *, failure: str = "") -> None:
    """Returns when every rank of `group` holds the same values and none has failed.

    One exchange settles everything, so that no rank goes on to wait for one that has stopped.

    Args:
        held: what this rank holds, by what it is called (``plan``: its fingerprint, ...).
        group: every rank of it calls this, whatever happened to it before.
        failure: why this rank cannot go on; empty where it can.

    Raises:
        PlanMismatchError: on every rank, when one failed or holds another value; it names the
            ranks, and what differs.
        TransferError: a rank of the group is gone or did not come in time.
    """
    mine = json.dumps(
        [failure, *(hashlib.sha256(one.encode()).hexdigest() for one in held.values())]
    )
    found = [json.loads(one) for one in gather_bytes(mine.encode(), group)]
    ranks = dist.get_process_group_ranks(group)
    failed = {rank: one[0] for rank, one in zip(ranks, found, strict=True) if one[0]}
    if failed:
        rank, reason = next(iter(failed.items()))
        raise PlanMismatchError(f"rank {rank} cannot run the plan: {reason}")
    for index, name in enumerate(held, start=1):
        values = [one[index] for one in found]
        usual = Counter(values).most_common(1)[0][0]
        others = [rank for rank, one in zip(ranks, values, strict=True) if one != usual]
        if others:
            raise PlanMismatchError(
                f"ranks {others} of {ranks} hold another {name} than the rest; every rank must "
                f"work from the same batch and settings (this rank's is {held[name][:16]})"
            )


def _gather(tensor: Tensor, size: int, group: dist.ProcessGroup) -> Sequence[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(size)]
    if tensor.numel():
        dist.all_gather(parts, tensor, group=group)
    return parts


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where a group's tensors must lie."""
    if dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _empty(length: int, group: dist.ProcessGroup) -> Tensor:
    return torch.empty(length, dtype=torch.uint8, device=_device(group))


def _to_tensor(data: bytes, group: dist.ProcessGroup) -> Tensor:
    if not data:
        return _empty(0, group)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device(group))


def _to_bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()
