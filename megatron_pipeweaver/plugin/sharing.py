"""What the ranks that run one plan tell each other of their batches, in front of every plan."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch.distributed as dist

from megatron_pipeweaver.errors import PipeWeaverError
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.codec import to_bytes
from megatron_pipeweaver.ir.json_reader import parse_json
from megatron_pipeweaver.planner.codec import from_json, to_json
from megatron_pipeweaver.planner.planner import batch_digest
from megatron_pipeweaver.planner.sharing import merge_batches
from megatron_pipeweaver.plugin.communicators import Communicators
from megatron_pipeweaver.runtime.agreement import gather_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedBatch:
    """A batch as the ranks that run one plan know it.

    `planned` is what is planned for: one replica's batch, or what several have at most. `own` is
    this replica's; both are `None` on ranks that load no data, if they need not know. `failure`
    says why an iteration cannot run.
    """

    planned: BatchMetadata | None = None
    own: BatchMetadata | None = None
    failure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What a rank tells: the digest of its batch and, on the first of a replica, the batch."""

    failure: str
    digest: str
    batch: BatchMetadata | None = None


def share_batch(batch: BatchMetadata | None, failure: str, ranks: Communicators) -> SharedBatch:
    """All replicas' batches, as far as they share a plan; every rank of them calls this.

    Args:
        batch: this rank's, `None` where it loads no data.
        failure: why it has none, if it should.
        ranks: who shares a plan.

    Raises:
        TransferError: a rank is gone or did not come in time.
    """
    if len(ranks.replicas) == 1:
        return SharedBatch(planned=batch, own=batch, failure=failure)
    rank = dist.get_rank()
    replica = next(one for one in ranks.replicas if rank in one)
    told = _Told(
        failure=failure,
        digest="" if batch is None else batch_digest(batch),
        batch=batch if rank == replica[0] else None,
    )
    gathered = gather_bytes(zlib.compress(to_bytes(to_json(told))), ranks.control)
    members = dist.get_process_group_ranks(ranks.control)
    found = {member: _read(data) for member, data in zip(members, gathered, strict=True)}
    failed = [f"rank {member}: {one.failure}" for member, one in found.items() if one.failure]
    failure = failed[0] if failed else ""
    batches = {one[0]: found[one[0]].batch for one in ranks.replicas}
    own = batches[replica[0]]
    if not failure and batch is not None and own is not None and told.digest != batch_digest(own):
        failure = f"it loads another batch than rank {replica[0]}, whose replica it belongs to"
    loaded = [one for one in batches.values() if one is not None]
    if len(loaded) < len(batches):
        return SharedBatch(own=own, failure=failure)
    try:
        return SharedBatch(planned=merge_batches(loaded), own=own, failure=failure)
    except PipeWeaverError as error:
        return SharedBatch(own=own, failure=failure or str(error))


def _read(data: bytes) -> _Told:
    return from_json(parse_json(zlib.decompress(data), "batch of another replica"), _Told)
