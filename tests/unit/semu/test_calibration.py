import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.calibration import (
    CheckpointSample,
    LayerSample,
    Sample,
    calibrate,
    non_negative_fit,
    relative_error,
    with_checkpoint_times,
    with_layer_times,
)
from megatron_pipeweaver.semu.cost import OperatorCosts
from megatron_pipeweaver.semu.devices import (
    DeviceProfile,
    load_device,
    profile_from_json,
    profile_to_json,
)
from megatron_pipeweaver.semu.operators import Sketch, elementwise, host_copy, linear
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.probes import measure
from megatron_pipeweaver.semu.work import NO_WORK, Operator, OperatorClass, Phase, Queue, Work

PROFILE = load_device("cpu")


def _linear(rows: int, width: int) -> Operator:
    sketch = Sketch("one", RunOptions.unfused())
    source = sketch.tensor("x", rows * width)
    linear(sketch, "l", source, rows=rows, width_in=width, width_out=2 * width, bias=False)
    return sketch.operators[-1]


def _sum(elements: int) -> Operator:
    sketch = Sketch("one", RunOptions.unfused())
    both = (sketch.tensor("x", elements), sketch.tensor("y", elements))
    elementwise(sketch, "sum", both, elements)
    return sketch.operators[-1]


def _sample(operator: Operator) -> Sample:
    """A device of 30 FLOP per ns that loses 10 rows and 1 us per launch; 2 bytes per ns.

    Input gradients start in 3 us and run at half the rate, weight gradients as the forward.
    """
    if operator.kind is OperatorClass.MATMUL:
        work = operator.forward
        rate = work.flops * (work.shape[0] + 10) / work.shape[0] / 30
        times = {
            Phase.FORWARD: 1000 + round(rate),
            Phase.INPUT_GRAD: 3000 + round(2 * rate),
            Phase.WEIGHT_GRAD: 1000 + work.flops // 30,
        }
    else:
        moved = operator.forward.memory_bytes
        times = {Phase.FORWARD: 1000 + moved // 2, Phase.INPUT_GRAD: 3000 + moved // 4}
    return Sample(operator=operator, times_ns=times)


SAMPLES = [
    _sample(one)
    for size in (8, 16, 32, 64, 128, 200, 256, 400)
    for one in (_linear(size, 64), _linear(64, size), _sum(size * 500))
]


def test_known_factors_are_found_again() -> None:
    fitted = calibrate(SAMPLES, PROFILE)
    assert max(fitted.held_out_error.values()) < 0.05
    matmul = fitted.profile.factors_of(OperatorClass.MATMUL)
    assert matmul.compute_permille == pytest.approx(1000 * 30 / 60, rel=0.1)
    assert matmul.half_sizes[0] == pytest.approx(10, abs=3)
    sums = fitted.profile.factors_of(OperatorClass.ELEMENTWISE)
    assert sums.memory_permille == pytest.approx(1000 * 2 / 10, rel=0.05)
    assert sums.overhead_ns == pytest.approx(1000, rel=0.1)


def test_forward_and_both_gradients_have_factors_of_their_own() -> None:
    matmul = calibrate(SAMPLES, PROFILE).profile.factors_of(OperatorClass.MATMUL)
    forward, inputs, weights = (matmul.of(phase) for phase in Phase)
    assert inputs.compute_permille == pytest.approx(forward.compute_permille / 2, rel=0.1)
    assert inputs.overhead_ns == pytest.approx(3000, rel=0.1)
    assert max(weights.half_sizes) <= 1


def test_fitted_profiles_round_trip_and_leave_other_classes_alone() -> None:
    fitted = calibrate(SAMPLES, PROFILE).profile
    assert profile_from_json(profile_to_json(fitted), "mine.json") == fitted
    assert fitted.factors_of(OperatorClass.NORM) == PROFILE.factors_of(OperatorClass.NORM)
    assert fitted.source.endswith("calibrated")


def test_relative_error_is_that_of_forward_and_backward_together() -> None:
    costs = OperatorCosts(PROFILE)
    operator = _sum(1000)
    predicted = sum(costs.latency_ns(operator, phase) for phase in Phase)
    times = {Phase.FORWARD: predicted, Phase.INPUT_GRAD: predicted}
    sample = Sample(operator=operator, times_ns=times)
    assert relative_error(sample, costs) == pytest.approx(0.5)


def _sent(size: int, time_ns: int) -> Sample:
    work = Work(network_bytes=size, steps=1)
    operator = Operator(
        name="send",
        kind=OperatorClass.SEND,
        inputs=(),
        outputs=(),
        forward=work,
        queue=Queue.PIPELINE_LINK,
    )
    return Sample(operator=operator, times_ns={Phase.FORWARD: time_ns})


def _links(latency_ns: int) -> DeviceProfile:
    return replace(PROFILE, spec=replace(PROFILE.spec, link_latency_ns=latency_ns))


def test_links_faster_than_the_profile_says_are_fitted_all_the_same() -> None:
    # Small messages took less than the profile's latency: nothing was left to fit to.
    sizes = [1 << power for power in range(12, 24)]
    samples = [_sent(size, 40_000 + size // 4) for size in sizes]
    found = calibrate(samples, _links(100_000))
    assert found.held_out_error[OperatorClass.SEND] < 0.01
    assert found.profile.spec.link_latency_ns <= 40_000 + sizes[0] // 4


def test_samples_that_the_machine_disturbed_do_not_bend_the_fit() -> None:
    sizes = [1 << power for power in range(12, 24)]
    times = [40_000 + size // 4 for size in sizes]
    times[1], times[6] = 3_000_000, 4_000_000  # a time slice of another process
    found = calibrate([*map(_sent, sizes, times)], _links(10_000))
    assert found.held_out_error[OperatorClass.SEND] < 0.03


def test_copies_refer_to_the_link_to_the_host() -> None:
    sizes = [1 << power for power in range(12, 24)]
    samples = [
        Sample(operator=host_copy(size), times_ns={Phase.FORWARD: 5_000 + size // 8})
        for size in sizes
    ]
    found = calibrate(samples, PROFILE)
    assert found.held_out_error[OperatorClass.HOST_COPY] < 0.01
    factors = found.profile.factors_of(OperatorClass.HOST_COPY)
    rate = PROFILE.spec.host_bandwidth * factors.network_permille // 1000
    assert rate == pytest.approx(8_000_000_000, rel=0.01)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 samples of elementwise"):
        calibrate([_sample(_sum(size)) for size in (10, 20, 30)], PROFILE)


def test_weights_are_never_negative() -> None:
    rows = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]
    falling = non_negative_fit(rows, [3.0, 2.0, 1.0])
    assert min(falling) >= 0.0
    assert non_negative_fit(rows, [5.0, 7.0, 9.0]) == pytest.approx((3.0, 2.0), rel=0.01)


def _chunk(kernels: int, emulated: int) -> LayerSample:
    """Layers take 1.2 times what operators do, and 50 us a kernel; backward 1.1 times alone."""
    return LayerSample(
        forward_kernels=kernels,
        backward_kernels=2 * kernels,
        emulated_forward_ns=emulated,
        emulated_backward_ns=2 * emulated,
        forward_ns=emulated * 12 // 10 + kernels * 50_000,
        backward_ns=2 * emulated * 11 // 10,
    )


def test_layers_take_what_the_framework_adds() -> None:
    plain = replace(PROFILE, layer_forward_ns=0, layer_backward_ns=0)
    samples = [_chunk(2, size) for size in (100_000, 400_000, 2_000_000)]
    fitted = with_layer_times(plain, samples)
    assert fitted.layer_forward_permille == pytest.approx(1200, rel=0.01)
    assert fitted.kernel_forward_ns == pytest.approx(50_000, rel=0.01)
    assert fitted.layer_backward_permille == pytest.approx(1100, rel=0.01)
    assert fitted.kernel_backward_ns < 1000


def test_layer_factors_are_never_fitted_upon_others() -> None:
    samples = [_chunk(2, 100_000), _chunk(2, 200_000)]
    with pytest.raises(ConfigError, match="no layer factors"):
        with_layer_times(replace(PROFILE, layer_forward_ns=1), samples)
    with pytest.raises(ConfigError, match="1 samples"):
        with_layer_times(replace(PROFILE, layer_forward_ns=0, layer_backward_ns=0), samples[:1])


def test_measured_operators_can_be_fitted() -> None:
    sizes = [(4, 32), (8, 32), (16, 64), (32, 64)]
    samples = measure(sizes=sizes, repeats=1)
    assert {one.operator.kind for one in samples} == {
        OperatorClass.MATMUL,
        OperatorClass.NORM,
        OperatorClass.ELEMENTWISE,
        OperatorClass.ACTIVATION,
        OperatorClass.GATED_ACTIVATION,
        OperatorClass.ATTENTION,
        OperatorClass.SOFTMAX,
        OperatorClass.HOST_COPY,
        OperatorClass.EMBEDDING,
    }
    for one in samples:
        assert one.times_ns[Phase.FORWARD] > 0
        assert (one.times_ns[Phase.INPUT_GRAD] > 0) == (one.operator.input_grad != NO_WORK)
        assert (one.times_ns[Phase.WEIGHT_GRAD] > 0) == (one.operator.weight_grad != NO_WORK)
    fitted = calibrate(samples, PROFILE).profile
    assert set(PROFILE.factors) <= set(fitted.factors)


def test_importing_the_emulator_does_not_load_torch() -> None:
    code = (
        "import sys; import megatron_pipeweaver.semu.probes, "
        "megatron_pipeweaver.partition.tune; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_checkpoints_take_is_what_is_left_over_and_outliers_do_not_count() -> None:
    samples = [
        CheckpointSample(
            checkpoints=count,
            emulated_forward_ns=1000,
            emulated_backward_ns=5000,
            forward_ns=1000 + 30 * count,
            backward_ns=5000 + 70 * count + late,
        )
        for count, late in ((2, 0), (4, 0), (4, 0), (6, 90_000))
    ]
    fitted = with_checkpoint_times(PROFILE, samples)
    assert (fitted.checkpoint_forward_ns, fitted.checkpoint_backward_ns) == (30, 70)
    assert fitted.has_layer_factors
    assert profile_from_json(profile_to_json(fitted), "fitted") == fitted
    fast = [replace(one, forward_ns=10, backward_ns=10) for one in samples]
    assert with_checkpoint_times(PROFILE, fast) == PROFILE
    with pytest.raises(ConfigError, match="something runs again"):
        with_checkpoint_times(PROFILE, [replace(samples[0], checkpoints=0)])
