import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import BatchMetadata, Item, MicrobatchMetadata


def test_count_of_a_module_without_items_is_zero():
    one = MicrobatchMetadata(
        sequence_length=8, items={"vision": (Item(units=4, tokens=1), Item(units=9, tokens=0))}
    )
    assert (one.count("vision"), one.count("audio")) == (2, 0)


def test_packed_documents_may_fill_the_sequence():
    one = MicrobatchMetadata(sequence_length=8, document_lengths=(3, 5))
    assert sum(one.document_lengths) == one.sequence_length


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Item(units=0, tokens=1), "units=0, tokens=1"),
        (lambda: Item(units=1, tokens=-1), "units=1, tokens=-1"),
        (lambda: MicrobatchMetadata(sequence_length=0), "sequence_length=0"),
        (lambda: MicrobatchMetadata(sequence_length=1, samples=0), "samples=0"),
        (
            lambda: MicrobatchMetadata(sequence_length=8, document_lengths=(4, 5)),
            "documents of 9 tokens do not fit into sequence_length=8",
        ),
        (
            lambda: MicrobatchMetadata(sequence_length=8, document_lengths=(4, 0)),
            "each of at least 1 token",
        ),
        (
            lambda: MicrobatchMetadata(sequence_length=8, samples=2, document_lengths=(4, 4)),
            "packed documents stand in one sample",
        ),
        (lambda: BatchMetadata(microbatches=()), "no microbatch"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
