import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.planner.cache import PlanKey, RecentCache


def test_what_was_not_used_for_longest_goes():
    cache = RecentCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert cache.get("b") is None
    assert cache.values() == (1, 3)
    cache.drop("a")
    cache.drop("a")
    assert cache.values() == (3,)


def test_a_cache_of_no_size_keeps_nothing():
    cache = RecentCache(0)
    cache.put("a", 1)
    assert cache.get("a") is None
    with pytest.raises(ConfigError, match="size is -1"):
        RecentCache(-1)


def test_keys_differ_by_batch_by_kind_and_by_settings():
    keys = {
        PlanKey(batch_digest=batch, forward_only=only, settings_digest=made)
        for batch in "ab"
        for only in (True, False)
        for made in "xy"
    }
    assert len(keys) == 8


@settings(max_examples=100)
@given(st.integers(0, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 6))))
def test_it_holds_what_a_list_in_order_of_use_holds(size, steps):
    cache, used = RecentCache(size), []
    for put, key in steps:
        if put:
            cache.put(key, key)
            used = [*(one for one in used if one != key), key][-size:] if size else []
        else:
            assert cache.get(key) == (key if key in used else None)
            used = sorted(used, key=lambda one: one == key)
        assert cache.values() == tuple(used)
        assert len(cache) == len(used) <= size
