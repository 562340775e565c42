import pytest

from megatron_pipeweaver.config import SECOND_NS, SearchConfig
from megatron_pipeweaver.errors import ConfigError


def test_defaults_are_one_second_on_one_thread():
    config = SearchConfig()
    assert (config.time_budget_ns, config.threads, config.seed) == (SECOND_NS, 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_budget_ns": -1}, "time budget is -1 ns; need >= 0"),
        ({"threads": 0}, "0 threads; need at least 1"),
        ({"max_rounds": -1}, "max_rounds is -1; need >= 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "need 0 <= seed < 2"),
    ],
)
def test_search_config_refuses(changes, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**changes)


def test_the_borders_are_inside():
    assert SearchConfig(time_budget_ns=0, threads=1, max_rounds=0, seed=2**63 - 1).max_rounds == 0
