"""Ending the search that is under way from another thread."""

from megatron_pipeweaver.planner.stops import Stops


def test_a_search_ends_when_its_number_or_a_later_one_is_ended():
    stops = Stops()
    first = stops.begin(2)
    stops.end(1)
    assert not first.requested
    stops.end(2)
    assert first.requested
    second = stops.begin(3)
    assert not second.requested
    stops.end(4)
    assert second.requested


def test_what_was_ended_before_it_began_ends_at_once():
    stops = Stops()
    stops.end(5)
    stops.end(3)
    assert stops.begin(4).requested
    assert stops.begin(5).requested
    assert not stops.begin(6).requested
