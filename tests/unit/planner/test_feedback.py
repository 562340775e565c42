"""Measured times correct predictions: robustly, in proportion, the same way every time."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.problem import OpKind
from megatron_pipeweaver.ir.trace import TraceKind, TraceRow
from megatron_pipeweaver.planner.feedback import (
    WIDEST,
    CorrectedCosts,
    CorrectionRow,
    Corrections,
    CostClass,
    Feedback,
    Sample,
    median_error_permille,
    role_of,
    samples_of,
    stage_times,
)
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.semu.interface import Load, StageShape
from tests.unit.planner.examples import (
    QUICK,
    SeededCosts,
    batch_of,
    even_cut,
    make_planner,
    vision_language,
)

HERE = CostClass("vision", "inner", "F", 5)
MODEL = vision_language()
CUT = even_cut(MODEL, 2)
SIZES = {"vision": 2}


def sample(ratio, where=HERE, predicted_ns=1_000_000):
    return Sample(
        cost_class=where, predicted_ns=predicted_ns, measured_ns=round(predicted_ns * ratio)
    )


def learnt(*samples):
    feedback = Feedback()
    feedback.add(samples)
    return feedback.corrections()


def test_without_samples_nothing_changes():
    assert learnt().permille(HERE) == 1000
    assert learnt(sample(0), sample(3, predicted_ns=0)).rows == ()


def test_few_samples_correct_less_than_many():
    found = [learnt(*[sample(3)] * count).permille(HERE) for count in (1, 4, 16, 64)]
    assert found == sorted(found)
    assert 1000 < found[0] < 2500
    assert 2900 < found[-1] <= 3000


def test_outliers_do_not_count():
    calm = [sample(2)] * 21
    assert learnt(*calm, *[sample(60)] * 10).permille(HERE) == pytest.approx(
        learnt(*[sample(2)] * 31).permille(HERE), abs=1
    )


def test_old_samples_go():
    feedback = Feedback()
    feedback.add([sample(0.25)] * 500)
    feedback.add([sample(4)] * 64)
    assert feedback.corrections().permille(HERE) > 3500


def test_a_size_that_was_never_seen_is_corrected_like_its_module():
    found = learnt(*[sample(5)] * 64)
    elsewhere = replace(HERE, size=9)
    assert found.permille(elsewhere) > 4000
    assert found.permille(replace(HERE, role="last")) > 4000
    # Of another module only this much is known: everything takes longer than predicted.
    assert found.permille(CostClass("language", "inner", "B", 3)) > 4000


def test_a_backward_that_was_never_split_corrects_its_weight_gradient():
    found = learnt(*[sample(1)] * 64, *[sample(4, replace(HERE, kind="B"))] * 64)
    assert found.permille(replace(HERE, kind="W")) == found.permille(replace(HERE, kind="B"))
    apart = learnt(
        *[sample(4, replace(HERE, kind="B"))] * 64, *[sample(1, replace(HERE, kind="W"))] * 64
    )
    assert apart.permille(replace(HERE, kind="W")) < 1500


def test_a_new_process_goes_on_from_what_was_known():
    known = learnt(*[sample(8)] * 64)
    feedback = Feedback(Corrections(known.rows))
    assert feedback.corrections().permille(HERE) == pytest.approx(known.permille(HERE), rel=0.01)
    feedback.add([sample(8)])
    assert feedback.corrections().permille(HERE) == pytest.approx(known.permille(HERE), rel=0.02)


ratios = st.floats(1e-6, 1e6, allow_nan=False)
classes = st.builds(
    CostClass,
    st.sampled_from(["vision", "language"]),
    st.sampled_from(["first", "inner", "last", "only"]),
    st.sampled_from("FBW"),
    st.integers(1, 4),
)
samples = st.builds(sample, ratios, classes, st.integers(1, 10**12))


@settings(max_examples=60, deadline=None)
@given(st.lists(samples, max_size=30), st.randoms(use_true_random=False))
def test_corrections_are_bounded_and_do_not_depend_on_the_order(rows, rng):
    shuffled = list(rows)
    rng.shuffle(shuffled)
    found = learnt(*rows)
    assert found.rows == learnt(*shuffled).rows
    assert all(1000 // WIDEST <= one.permille <= 1000 * WIDEST for one in found.rows)


def test_a_correction_out_of_bounds_is_refused():
    with pytest.raises(ConfigError, match="0 permille; need 15 to 64000"):
        CorrectionRow(module="", role="", kind="", size=0, permille=0)


def test_small_changes_leave_the_coarse_form():
    def rows(permille):
        return Corrections(
            [CorrectionRow(module="m", role="", kind="F", size=0, permille=permille)]
        ).coarse()

    assert rows(1000) == rows(1050) != rows(1300)


def test_corrected_costs_change_times_alone():
    costs = CorrectedCosts(SeededCosts())
    shape = StageShape(layers=1, is_first=False, is_last=False)
    load = Load(sequence=16, batch=2, lengths=(16, 16))
    module = MODEL.modules[0]
    plain = costs.stage_strategies(module, shape, load)
    assert plain == SeededCosts().stage_strategies(module, shape, load)
    costs.corrections = Corrections(
        [
            CorrectionRow(module="vision", role="inner", kind="F", size=6, permille=3000),
            CorrectionRow(module="vision", role="", kind="B", size=0, permille=500),
        ]
    )
    for before, after in zip(plain, costs.stage_strategies(module, shape, load), strict=True):
        assert after.forward_ns == 3 * before.forward_ns
        assert abs(after.backward_ns - before.backward_ns / 2) <= 1
        assert abs(after.weight_grad_ns - before.weight_grad_ns / 2) <= 1
        assert (after.name, after.memory_bytes) == (before.name, before.memory_bytes)
    assert costs.p2p_latency_ns(640) == SeededCosts().p2p_latency_ns(640)


def rows_of(planned, duration_ns):
    """The ops of `planned`, in which every one takes what `duration_ns` says."""
    return [
        TraceRow(
            kind=TraceKind.COMPUTE,
            key=op.key,
            strategy=op.strategy,
            start_ns=op.start_ns,
            end_ns=op.start_ns + duration_ns(op),
        )
        for rank in planned.schedule.ranks
        for op in rank
    ]


def measured(planned, batch, duration_ns):
    times = stage_times(rows_of(planned, duration_ns))
    return samples_of(times, batch, planned.problem, MODEL, CUT, SIZES)


def test_what_took_as_long_as_predicted_has_no_error():
    batch = batch_of(3, 0, 5)
    planned = make_planner().plan(batch)
    found = measured(planned, batch, lambda op: op.end_ns - op.start_ns)
    ops = sum(map(len, planned.schedule.ranks))
    assert len(found) == ops
    assert all(one.predicted_ns == one.measured_ns for one in found)
    assert median_error_permille(found, Corrections()) == 0


def test_a_host_whose_clock_is_off_teaches_the_same():
    batch = batch_of(3, 0, 5)
    planned = make_planner().plan(batch)
    rows = rows_of(planned, lambda op: op.end_ns - op.start_ns + 3)
    hour_ns = 3_600 * 10**9
    skewed = [
        replace(
            row,
            start_ns=row.start_ns + row.key.stage % 2 * hour_ns,
            end_ns=row.end_ns + row.key.stage % 2 * hour_ns,
        )
        for row in rows
    ]
    assert skewed != rows
    assert stage_times(skewed) == stage_times(rows)


def test_ops_that_the_problem_does_not_know_teach_nothing():
    batch = batch_of(3, 0, 5)
    planned = make_planner().plan(batch)
    other = make_planner().plan(batch_of(1))
    times = stage_times(rows_of(planned, lambda op: 5))
    found = samples_of(times, batch_of(1), other.problem, MODEL, CUT, SIZES)
    assert 0 < len(found) < len(times)


def test_the_error_shrinks_over_the_first_iterations():
    # A device that is slower than thought, for every module and direction by another factor.
    factors = {("vision", "F"): 3.0, ("vision", "B"): 5.0, ("language", "F"): 0.5}
    rng = random.Random(1)

    class Coarse(SeededCosts):
        """Milliseconds instead of nanoseconds, so that rounding does not matter."""

        def stage_strategies(self, module, stage, load):
            return tuple(
                replace(
                    one,
                    forward_ns=one.forward_ns * 10**6,
                    backward_ns=one.backward_ns * 10**6,
                    weight_grad_ns=one.weight_grad_ns * 10**6,
                )
                for one in super().stage_strategies(module, stage, load)
            )

    costs, feedback, errors = CorrectedCosts(Coarse()), Feedback(), []
    for _ in range(10):
        batch = batch_of(*(rng.choice([0, 1, 2, 3, 5]) for _ in range(4)))
        planner = Planner(
            model=MODEL,
            layout=CUT,
            costs=costs,
            sub_microbatch=SIZES,
            memory_capacity_bytes=(10_000,) * 2,
            dtypes={"vision": "bfloat16", "language": "bfloat16"},
            search=QUICK,
        )
        planned = planner.plan(batch)
        plain = make_planner(costs=Coarse()).workload(batch).problem
        true = {
            (key, stage): {one.name: one for one in strategies}
            for key, each in plain.passes()
            for stage, strategies in enumerate(each.stages)
        }

        def took(op, true=true):
            key = op.key
            one = true[key[1:4], key.stage][op.strategy]
            plain_ns = (
                one.forward_ns if key.kind is OpKind.F else one.backward_ns + one.weight_grad_ns
            )
            noise = rng.uniform(0.9, 1.1)
            return round(plain_ns * factors.get((key.module, key.kind.value), 1.0) * noise)

        times = stage_times(rows_of(planned, took))
        found = samples_of(times, batch, plain, MODEL, CUT, SIZES)
        errors.append(median_error_permille(found, costs.corrections))
        feedback.add(found)
        costs.corrections = feedback.corrections()
    assert errors[0] > 500
    assert max(errors[-3:]) < 100
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("first", "last", "role"),
    [(True, True, "only"), (True, False, "first"), (False, True, "last"), (False, False, "inner")],
)
def test_roles(first, last, role):
    assert role_of(StageShape(layers=1, is_first=first, is_last=last)) == role
