"""The same plan on every rank: bytes from one rank to all, and a check that all hold the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

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


def agree(fingerprint: str, group: dist.ProcessGroup) -> None:
    """Returns when every rank of `group` holds the same `fingerprint`.

    Raises:
        PlanMismatchError: on every rank, when one holds another; it names the ranks that differ.
        TransferError: a rank of the group is gone or did not come in time.
    """
    mine = hashlib.sha256(fingerprint.encode()).digest()
    found = gather_bytes(mine, group)
    usual = Counter(found).most_common(1)[0][0]
    ranks = dist.get_process_group_ranks(group)
    others = [rank for rank, one in zip(ranks, found, strict=True) if one != usual]
    if others:
        raise PlanMismatchError(
            f"ranks {others} of {ranks} hold another plan than the rest; every rank must plan "
            f"from the same batch and settings (this rank's fingerprint is {fingerprint[:16]})"
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
