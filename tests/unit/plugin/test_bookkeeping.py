"""Ops, chunks and ranks of pipelines of 24 ranks: which chunk runs what, and who makes the loss."""

from collections import Counter
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.problem import OpKey, OpKind
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.plugin.stages import MegatronStages, StepContext, unwrap
from tests.unit.models.examples import OPTIONS, cut, vision_language

RANKS = 24
SEGMENTS = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 3)]


def layout(vision: int, language: int) -> ChunkLayout:
    """A layer on every other vision stage, so that many stages hold none."""
    return cut(
        RANKS,
        vision=[stage % 2 for stage in range(RANKS * vision)],
        language=[1] * (RANKS * language),
    )


def all_ops(cuts: ChunkLayout) -> list[OpKey]:
    return [
        OpKey(OpKind.F, 0, one.module, 0, stage)
        for one in cuts.modules
        for stage in range(len(one.layers))
    ]


def stages_of(cuts: ChunkLayout, model=()) -> MegatronStages:
    context = StepContext(
        forward_step_func=lambda iterator, model: None,
        model=model,
        microbatches=[],
        config=None,
        forward_only=False,
        collect_non_loss_data=False,
        first_val_step=None,
    )
    return MegatronStages(context, cuts, SimpleNamespace(passes=(), ranks=()))


@pytest.fixture(autouse=True)
def on_cpu(one_process):
    """Stages count tokens on the current device."""


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_every_op_finds_its_chunk_on_its_rank(segments):
    cuts = layout(*segments)
    places = [cuts.chunks_of_rank(rank) for rank in range(RANKS)]
    used = Counter()
    for op in all_ops(cuts):
        rank = op.stage % RANKS
        place = places[rank][cuts.virtual_stage(op.module, op.stage)]
        assert (place.module, place.stage) == (op.module, op.stage)
        used[rank, place.virtual_stage] += 1
    assert used == Counter(
        {(rank, chunk): 1 for rank in range(RANKS) for chunk in range(sum(segments))}
    )


@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_one_chunk_of_the_job_makes_the_loss(segments):
    cuts = layout(*segments)
    stages = stages_of(cuts)
    makers = [op for op in all_ops(cuts) if stages._makes_loss(op)]
    assert [(op.module, op.stage) for op in makers] == [("language", RANKS * segments[1] - 1)]
    assert makers[0].stage % RANKS == RANKS - 1
    assert cuts.virtual_stage(*makers[0][2:5:2]) == sum(segments) - 1


def test_every_rank_builds_the_chunks_of_its_place(groups):
    cuts = layout(1, 2)
    model = vision_language(vision_layers=12, language_layers=48)
    ends = []
    for rank in range(RANKS):
        chunks = build_chunks(model, cuts, OPTIONS, pg_collection=groups, rank=rank)
        assert [chunk.place for chunk in chunks] == list(cuts.chunks_of_rank(rank))
        assert [chunk.vp_stage for chunk in chunks] == [0, 1, 2]
        assert all(chunk.pg_collection.pp.rank() == rank for chunk in chunks)
        assert all(chunk.pg_collection.pp.size() == RANKS for chunk in chunks)
        assert len({id(chunk.config) for chunk in chunks}) == 1, "chunks share one root config"
        ends.append([(one.pre_process, one.embeds_tokens, one.post_process) for one in chunks])
    no, first = (False, False, False), (True, False, False)
    embeds, last = (False, True, False), (False, False, True)
    assert ends[0] == [first, embeds, no]
    assert ends[-1] == [no, no, last]
    assert set(chain(*ends[1:-1])) == {no}


class Wrapper(torch.nn.Module):
    """As Megatron wraps models."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_chunks_are_found_inside_megatrons_wrappers(groups):
    model = vision_language(vision_layers=12, language_layers=24)
    chunk = build_chunks(model, layout(1, 1), OPTIONS, pg_collection=groups, rank=5)[1]
    assert unwrap(Wrapper(Wrapper(chunk))) is chunk
    assert unwrap(chunk) is chunk
    with pytest.raises(RuntimeError, match="place"):
        unwrap(Wrapper(Wrapper(torch.nn.Linear(1, 1))))
