import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import DeviceSpec, ParallelSizes

RATES = {
    "flops": 1,
    "memory_bytes": 1,
    "memory_bandwidth": 1,
    "scale_up_bandwidth": 1,
    "scale_out_bandwidth": 1,
    "host_bandwidth": 1,
}


@pytest.mark.parametrize("what", RATES)
def test_a_device_without_a_rate_is_refused(what):
    with pytest.raises(ConfigError, match=f"device 'x': {what} must be >= 1"):
        DeviceSpec(name="x", **(RATES | {what: 0}))


def test_a_device_with_negative_latency_is_refused():
    with pytest.raises(ConfigError, match="device 'x': link_latency_ns must be >= 0"):
        DeviceSpec(name="x", **RATES, link_latency_ns=-1)


def test_world_size_leaves_expert_parallelism_inside():
    assert ParallelSizes(pipeline=4, tensor=2, data=3, context=2, expert=3).world_size == 48


@pytest.mark.parametrize("what", ["pipeline", "tensor", "data", "context", "expert"])
def test_sizes_are_at_least_one(what):
    with pytest.raises(ConfigError, match=f"{what} is 0; need >= 1"):
        ParallelSizes(**({"pipeline": 1} | {what: 0}))
