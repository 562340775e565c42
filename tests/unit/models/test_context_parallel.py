"""How a sequence is dealt to context-parallel ranks."""

from dataclasses import dataclass

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.context_parallel import SequenceShare


@dataclass(frozen=True, slots=True)
class Place:
    """A rank of a group that does not communicate."""

    at: int
    ranks: int

    def rank(self) -> int:
        return self.at

    def size(self) -> int:
        return self.ranks


def shares(ranks: int) -> list[SequenceShare]:
    return [SequenceShare(Place(rank, ranks)) for rank in range(ranks)]


def test_a_rank_has_a_front_chunk_and_the_back_chunk_to_it():
    tokens = torch.arange(12)[None]
    found = [one.take(tokens, dim=1).tolist() for one in shares(3)]
    assert found == [[[0, 1, 10, 11]], [[2, 3, 8, 9]], [[4, 5, 6, 7]]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_tokens_meet_the_rotary_embeddings_that_megatron_deals(one_process, ranks):
    angles = torch.arange(24.0).view(24, 1, 1, 1)
    for one in shares(ranks):
        assert torch.equal(one.take(angles, 0), get_pos_emb_on_this_cp_rank(angles, 0, one.group))


def test_gradients_of_other_ranks_tokens_are_zero():
    embedded = torch.ones(8, 1, 2, requires_grad=True)
    shares(2)[1].take(embedded, 0).sum().backward()
    assert embedded.grad[:, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_a_sequence_that_cannot_be_dealt_is_refused():
    with pytest.raises(ConfigError, match=r"10 tokens on 2 context-parallel ranks.* multiple of 4"):
        shares(2)[0].take(torch.zeros(1, 10), dim=1)
