"""Replicas that share a plan, because their stages talk to each other: expert parallelism.

Every microbatch of the shared plan is as large as the largest of the replicas' at its place: they
meet in every layer with experts, so whoever has most to do is waited for, and a replica's own part
never needs more memory than planned.

    replica 0 | 3 images | 0 images |        replicas plan together for | 3 images | 2 images |
    replica 1 | 1 image  | 2 images |        and leave out what they have not
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from megatron_pipeweaver.compiler.narrow import narrow
from megatron_pipeweaver.compiler.verify import verify
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.ir.plan import Plan, VerifiedPlan
from megatron_pipeweaver.partition.workload import payloads_of


def merge_batches(batches: Sequence[BatchMetadata]) -> BatchMetadata:
    """The elementwise maximum of `batches`, one per replica.

    Microbatches are compared place by place, and so are a module's items. Of packed documents
    those stay whose attention costs most; a sequence that is not packed counts as one document.

    Raises:
        ConfigError: the replicas have different numbers of microbatches.
    """
    counts = [len(one.microbatches) for one in batches]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"replicas that share a plan have {counts} microbatches; give all of them as many"
        )
    rows = zip(*(one.microbatches for one in batches), strict=True)
    return BatchMetadata(microbatches=tuple(_largest(row) for row in rows))


def _largest(microbatches: Sequence[MicrobatchMetadata]) -> MicrobatchMetadata:
    names = dict.fromkeys(name for one in microbatches for name in one.items)
    samples = max(one.samples for one in microbatches)
    return MicrobatchMetadata(
        sequence_length=max(one.sequence_length for one in microbatches),
        samples=samples,
        items={
            name: tuple(
                _largest_item([item for item in row if item is not None])
                for row in zip_longest(*(one.items.get(name, ()) for one in microbatches))
            )
            for name in names
        },
        document_lengths=(
            () if samples > 1 else max(microbatches, key=_attention).document_lengths
        ),
    )


def _largest_item(items: Sequence[Item]) -> Item:
    return Item(units=max(one.units for one in items), tokens=max(one.tokens for one in items))


def _attention(one: MicrobatchMetadata) -> int:
    """What attention over the backbone's sequences costs, up to a factor."""
    documents = one.document_lengths or (one.sequence_length,) * one.samples
    return sum(length**2 for length in documents)


def own_part(
    shared: VerifiedPlan, batch: BatchMetadata, model: ModelSpec, parallel: ParallelSizes | None
) -> VerifiedPlan:
    """What the replica with `batch` runs of a plan for several replicas, verified.

    Args:
        shared: a plan for the maximum of batches of which `batch` is one.
        batch: the replica's own.
        model: the modules.
        parallel: tensor, sequence and context parallel sizes, on which shapes depend.
    """
    payloads = payloads_of(batch, model, shared.plan.passes, parallel)
    if payloads == {one.key: one.payload for one in shared.plan.passes}:
        return shared
    return verify(narrow(shared.plan, payloads))


def planned_larger(shared: Plan, own: Plan) -> tuple[int, ...]:
    """Which passes of `own`, by their indices, are smaller than they were planned in `shared`.

    From these nothing can be learnt of what stages of the shared plan take.
    """
    planned = {one.key: one.payload for one in shared.passes}
    return tuple(index for index, one in enumerate(own.passes) if one.payload != planned[one.key])
