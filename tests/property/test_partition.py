"""Cuts and splits: nothing lost, nothing twice, as even as can be."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_pipeweaver.partition.chunks import (
    choose_segments,
    choose_sub_microbatch,
    cut_layers,
)
from megatron_pipeweaver.partition.sub_microbatch import split


@given(st.integers(0, 500), st.integers(1, 60))
def test_split_covers_all_items_once_in_the_fewest_even_pieces(count: int, size: int) -> None:
    pieces = split(count, size)
    assert [item for start, stop in pieces for item in range(start, stop)] == list(range(count))
    lengths = [stop - start for start, stop in pieces]
    assert len(pieces) == -(-count // size)
    assert max(lengths, default=0) <= size
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@given(st.integers(0, 200), st.integers(1, 64))
def test_cut_gives_every_layer_to_one_stage(layers: int, stages: int) -> None:
    cut = cut_layers(layers, stages)
    assert (len(cut), sum(cut)) == (stages, layers)
    assert max(cut) - min(cut) <= 1
    assert list(cut) == sorted(cut, reverse=True)


@given(st.dictionaries(st.integers(1, 64), st.integers(1, 10**9), min_size=1))
def test_the_chosen_size_is_efficient_and_no_smaller_one_is(times: dict[int, int]) -> None:
    chosen = choose_sub_microbatch(times)
    best = max(times, key=lambda size: (size / times[size], -size))

    def reaches(size: int) -> bool:
        return 100 * size * times[best] >= 95 * best * times[size]

    assert reaches(chosen)
    assert not any(reaches(size) for size in times if size < chosen)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 10**9), min_size=1))
def test_segments_make_segment_times_alike(times: dict[str, int]) -> None:
    segments = choose_segments(times)
    fastest = min(times.values())
    for name, time in times.items():
        assert fastest * segments[name] <= time < fastest * (segments[name] + 1)
