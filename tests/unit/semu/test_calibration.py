import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.semu.calibration import (
    LayerSample,
    Sample,
    calibrate,
    measure,
    non_negative_fit,
    relative_error,
    with_layer_times,
)
from megatron_pipeweaver.semu.cost import OperatorCosts
from megatron_pipeweaver.semu.devices import load_device, profile_from_json, profile_to_json
from megatron_pipeweaver.semu.operators import Sketch, elementwise, linear
from megatron_pipeweaver.semu.options import RunOptions
from megatron_pipeweaver.semu.work import Operator, OperatorClass, Phase

PROFILE = load_device("cpu")


def _linear(rows: int, width: int) -> Operator:
    sketch = Sketch("one", RunOptions.unfused())
    source = sketch.tensor("x", rows * width)
    linear(sketch, "l", source, rows=rows, width_in=width, width_out=2 * width, bias=True)
    return sketch.operators[-1]


def _sum(elements: int) -> Operator:
    sketch = Sketch("one", RunOptions.unfused())
    both = (sketch.tensor("x", elements), sketch.tensor("y", elements))
    elementwise(sketch, "sum", both, elements)
    return sketch.operators[-1]


def _sample(operator: Operator) -> Sample:
    """A device of 30 FLOP per ns that loses 10 rows and 1 us per launch; 2 bytes per ns."""
    if operator.kind is OperatorClass.MATMUL:
        work = operator.forward
        forward = 1000 + round(work.flops * (work.shape[0] + 10) / work.shape[0] / 30)
        return Sample(operator=operator, forward_ns=forward, backward_ns=3 * forward)
    forward = 1000 + operator.forward.memory_bytes // 2
    return Sample(operator=operator, forward_ns=forward, backward_ns=forward // 2)


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


def test_fitted_profiles_round_trip_and_leave_other_classes_alone() -> None:
    fitted = calibrate(SAMPLES, PROFILE).profile
    assert profile_from_json(profile_to_json(fitted), "mine.json") == fitted
    assert fitted.factors_of(OperatorClass.NORM) == PROFILE.factors_of(OperatorClass.NORM)
    assert fitted.source.endswith("calibrated")


def test_relative_error_is_that_of_forward_and_backward_together() -> None:
    costs = OperatorCosts(PROFILE)
    operator = _sum(1000)
    predicted = sum(costs.latency_ns(operator, phase) for phase in Phase)
    sample = Sample(operator=operator, forward_ns=predicted, backward_ns=predicted)
    assert relative_error(sample, costs) == pytest.approx(0.5)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 samples of elementwise"):
        calibrate([_sample(_sum(size)) for size in (10, 20, 30)], PROFILE)


def test_weights_are_never_negative() -> None:
    rows = [(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]
    falling = non_negative_fit(rows, [3.0, 2.0, 1.0])
    assert min(falling) >= 0.0
    assert non_negative_fit(rows, [5.0, 7.0, 9.0]) == pytest.approx((3.0, 2.0), rel=0.01)


def test_layers_take_what_the_framework_adds() -> None:
    samples = [
        LayerSample(
            layers=2,
            emulated_forward_ns=100,
            emulated_backward_ns=200,
            forward_ns=100 + 2 * extra,
            backward_ns=200 + 4 * extra,
        )
        for extra in (9, 10, 50)
    ]
    plain = replace(PROFILE, layer_forward_ns=0, layer_backward_ns=0)
    fitted = with_layer_times(plain, samples)
    assert (fitted.layer_forward_ns, fitted.layer_backward_ns) == (10, 20)
    faster = [replace(one, forward_ns=0, backward_ns=0) for one in samples]
    assert with_layer_times(plain, faster) == plain


def test_measured_operators_can_be_fitted() -> None:
    sizes = [(4, 32), (8, 32), (16, 64), (32, 64)]
    samples = measure(sizes=sizes, repeats=1)
    assert {one.operator.kind for one in samples} == {
        OperatorClass.MATMUL,
        OperatorClass.NORM,
        OperatorClass.ELEMENTWISE,
        OperatorClass.ACTIVATION,
        OperatorClass.ATTENTION,
        OperatorClass.SOFTMAX,
    }
    assert all(one.forward_ns > 0 and one.backward_ns > 0 for one in samples)
    fitted = calibrate(samples, PROFILE).profile
    assert set(PROFILE.factors) <= set(fitted.factors)


def test_importing_the_emulator_does_not_load_torch() -> None:
    code = (
        "import sys; import megatron_pipeweaver.semu.calibration, "
        "megatron_pipeweaver.partition.tune; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
