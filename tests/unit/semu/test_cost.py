import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import DeviceSpec
from megatron_pipeweaver.semu.cost import OperatorCosts
from megatron_pipeweaver.semu.devices import DeviceProfile, Factors
from megatron_pipeweaver.semu.work import (
    NO_WORK,
    Operator,
    OperatorClass,
    Phase,
    Queue,
    Work,
)

SPEC = DeviceSpec(
    name="round",
    flops=10**12,  # 1000 per ns
    memory_bytes=10**9,
    memory_bandwidth=10**11,  # 100 per ns
    scale_up_bandwidth=10**10,  # 10 per ns
    scale_out_bandwidth=10**9,  # 1 per ns
    host_bandwidth=2 * 10**9,  # 2 per ns
    link_latency_ns=7,
)


def _costs(factors: Factors | None = None, **more: object) -> OperatorCosts:
    table = {} if factors is None else dict.fromkeys(OperatorClass, factors)
    return OperatorCosts(DeviceProfile(spec=SPEC, factors=table), **more)  # type: ignore[arg-type]


def test_the_slowest_of_compute_memory_and_network_counts() -> None:
    costs = _costs()
    assert costs.work_ns(Work(flops=10_000, memory_bytes=100), OperatorClass.MATMUL) == 10
    assert costs.work_ns(Work(flops=10_000, memory_bytes=5_000), OperatorClass.MATMUL) == 50
    assert (
        costs.work_ns(Work(network_bytes=300, steps=2, memory_bytes=100), OperatorClass.ALL_REDUCE)
        == 30 + 2 * 7
    )


def test_efficiency_factors_stretch_their_own_term() -> None:
    costs = _costs(Factors(compute_permille=500, memory_permille=250, overhead_ns=3))
    assert costs.work_ns(Work(flops=10_000), OperatorClass.MATMUL) == 3 + 20
    assert costs.work_ns(Work(memory_bytes=100), OperatorClass.NORM) == 3 + 4
    assert costs.work_ns(Work(flops=10_000, kernels=4), OperatorClass.MATMUL) == 12 + 20


def test_matmul_has_half_its_rate_at_its_half_size() -> None:
    costs = _costs(Factors(half_sizes=(32, 0, 0)))
    small = costs.work_ns(Work(flops=64_000, shape=(32, 100, 10)), OperatorClass.MATMUL)
    large = costs.work_ns(Work(flops=64_000, shape=(32_000, 1, 1)), OperatorClass.MATMUL)
    assert (small, large) == (128, 65)


def test_links_are_chosen_by_queue() -> None:
    costs = _costs(scale_out=frozenset({Queue.PIPELINE_LINK}))
    work = Work(network_bytes=100, steps=1)
    assert costs.work_ns(work, OperatorClass.SEND, Queue.TENSOR_LINK) == 17
    assert costs.work_ns(work, OperatorClass.SEND, Queue.PIPELINE_LINK) == 107
    assert costs.work_ns(work, OperatorClass.HOST_COPY, Queue.HOST_LINK) == 50  # no message


def _operator(forward: Work) -> Operator:
    return Operator(name="one", kind=OperatorClass.MATMUL, inputs=(), outputs=(), forward=forward)


def test_rules_of_a_user_come_first() -> None:
    asked = []

    def rule(operator: Operator, phase: Phase) -> int | None:
        asked.append((operator.name, phase))
        return 42 if operator.forward.flops == 1 else None

    costs = _costs(rules={OperatorClass.MATMUL: rule})
    assert costs.latency_ns(_operator(Work(flops=1)), Phase.FORWARD) == 42
    assert costs.latency_ns(_operator(Work(flops=5000)), Phase.FORWARD) == 5
    assert asked == [("one", Phase.FORWARD)] * 2


@pytest.mark.parametrize("found", [-1, 1.5, float("nan"), True, "7"])
def test_rules_that_return_no_time_are_refused_by_name(found: object) -> None:
    costs = _costs(rules={OperatorClass.MATMUL: lambda operator, phase: found})
    with pytest.raises(ConfigError, match=r"rule for matmul, operator 'one', forward: returned"):
        costs.latency_ns(_operator(Work(flops=1)), Phase.FORWARD)


def test_no_work_takes_no_time_whatever_the_overhead() -> None:
    costs = _costs(Factors(overhead_ns=99))
    assert costs.latency_ns(_operator(NO_WORK), Phase.FORWARD) == 0
