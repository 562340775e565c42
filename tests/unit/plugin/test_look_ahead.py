"""Reading ahead never changes what Megatron's iterators hand out."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.data import (
    BufferedIterator,
    LoaderState,
    LookAhead,
    data_state_hook,
)


def numbers(count=100):
    return iter([{"x": index} for index in range(count)])


def xs(microbatches):
    return None if microbatches is None else [one["x"] for one in microbatches]


def test_an_iterator_that_is_given_once_is_not_read_ahead():
    look, source = LookAhead(), numbers()
    assert xs(look.take([source, source], 3)) == [0, 1, 2]
    assert look.peek([source, source], 3) is None
    assert next(source) == {"x": 3}
    look.take(other := numbers(), 1)
    look.take(other, 1)
    assert look.peek(source, 3) is None


def test_one_that_is_given_again_is_read_ahead_by_what_comes_next():
    look, source = LookAhead(), numbers()
    look.take(source, 3)
    assert xs(look.take(source, 3)) == [3, 4, 5]
    assert xs(look.peek(source, 3)) == [6, 7, 8]
    assert xs(look.peek(source, 3)) == [6, 7, 8]
    assert xs(look.take(source, 3)) == [6, 7, 8]


def test_another_number_of_microbatches_loses_none():
    look, source = LookAhead(), numbers()
    look.take(source, 2)
    look.take(source, 2)
    assert xs(look.peek(source, 2)) == [4, 5]
    assert xs(look.take(source, 5)) == [4, 5, 6, 7, 8]
    assert xs(look.peek(source, 5)) == [9, 10, 11, 12, 13]
    assert xs(look.take(source, 1)) == [9]
    assert xs(look.peek(source, 2)) == [10, 11]


def test_evaluation_in_between_has_an_iterator_of_its_own():
    look, training, evaluation = LookAhead(), numbers(), numbers()
    for start in (0, 2):
        assert xs(look.take(training, 2)) == [start, start + 1]
        assert xs(look.peek(training, 2)) == ([4, 5] if start else None)
    for start in (0, 3, 6):
        assert xs(look.take(evaluation, 3)) == [start, start + 1, start + 2]
        look.peek(evaluation, 3)
    for _ in range(20):  # evaluations of other data sets
        look.take(numbers(), 1)
    assert xs(look.take(training, 2)) == [4, 5]
    assert xs(look.take(evaluation, 1)) == [9]


def test_an_end_that_is_seen_ahead_comes_when_it_is_due():
    look, source = LookAhead(), numbers(5)
    look.take(source, 2)
    look.take(source, 2)
    assert look.peek(source, 2) is None
    assert xs(look.take(source, 1)) == [4]
    with pytest.raises(ConfigError, match="ended at microbatch 0 of 1"):
        look.take(source, 1)


def test_an_error_that_is_met_ahead_is_raised_when_it_is_due():
    def broken():
        yield {"x": 0}
        yield {"x": 1}
        yield {"x": 2}
        raise OSError("disk")

    look, source = LookAhead(), broken()
    look.take(source, 1)
    look.take(source, 1)
    assert look.peek(source, 2) is None
    assert xs(look.take(source, 1)) == [2]
    with pytest.raises(OSError, match="disk"):
        look.take(source, 1)


@pytest.mark.parametrize("source", [None, [None, None]])
def test_a_rank_without_data_has_nothing_to_look_at(source):
    look = LookAhead()
    for _ in range(2):
        assert look.take(source, 2) == [None, None]
        assert look.peek(source, 2) is None


def test_megatrons_replaying_iterator_replays_what_was_taken():
    look = LookAhead()
    source = RerunDataIterator(numbers())
    for start in (0, 2, 4):
        source.advance()
        assert xs(look.take(source, 2)) == [start, start + 1]
        look.peek(source, 2)
        source.saved_microbatches = source.saved_microbatches or [
            {"x": start},
            {"x": start + 1},
        ]
        source.rewind()
        assert xs(look.take(source, 2)) == [start, start + 1]
        assert xs(look.peek(source, 2)) == [start + 2, start + 3]
    assert isinstance(source.iterable, BufferedIterator)
    source.advance()
    assert next(source) == {"x": 6}


class Savable:
    """Numbers from a place on, which it can tell."""

    def __init__(self, state=None):
        self._next = state["source"] + state["skip"] if state else 0
        self.saved = 0

    def __iter__(self):
        return self

    def __next__(self):
        self._next += 1
        return {"x": self._next - 1}

    def save_state(self):
        self.saved += 1
        return LoaderState(source=self._next, skip=0)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), max_size=20))
def test_a_state_is_that_of_what_was_taken_whatever_was_read_ahead(steps):
    look, source, taken = LookAhead(), RerunDataIterator(Savable()), []
    taken += xs(look.take(source, 1))
    for peek, count in steps:
        if peek:
            look.peek(source, count)
        else:
            source.advance()
            taken += xs(look.take(source, count))
        following = Savable(source.iterable.save_state())
        assert next(following) == {"x": len(taken)}
    assert taken == list(range(len(taken)))


def test_a_state_is_asked_for_once_per_iteration_and_not_per_microbatch():
    look, source = LookAhead(), Savable()
    for _ in range(5):
        look.take(source, 8)
        look.peek(source, 8)
    assert source.saved <= 5


def test_a_source_without_state_is_refused_by_name():
    buffer = BufferedIterator(numbers())
    with pytest.raises(ConfigError, match="--dataloader-save: a list_iterator has no save_state"):
        buffer.save_state()


def test_megatron_saves_the_iterator_that_is_read():
    told = []
    save = data_state_hook(lambda *given: told.append(given))
    save(["first", "second"], 3, "folder")
    save("alone", 4, "folder")
    save(None, 5, "folder")
    assert told == [("first", 3, "folder"), ("alone", 4, "folder"), (None, 5, "folder")]


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 1)), max_size=20),
)
def test_whatever_is_peeked_each_iterator_keeps_its_order(steps):
    look, sources, taken = LookAhead(), (numbers(200), numbers(200)), ([], [])
    for peek, count, which in steps:
        if peek:
            seen = xs(look.peek(sources[which], count))
            if seen is not None:
                start = len(taken[which])
                assert seen == list(range(start, start + count))
        else:
            taken[which].extend(xs(look.take(sources[which], count)))
    for one in taken:
        assert one == list(range(len(one)))
