"""Megatron's steps on real chunks of stand-in ranks, all in this process."""

import random
import weakref
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_pipeweaver.config import SearchConfig
from megatron_pipeweaver.ir.batch import BatchMetadata
from megatron_pipeweaver.ir.plan import ActionKind, ComputeAction, PassPayload, PlanPass
from megatron_pipeweaver.ir.problem import OpKey, OpKind, PassKey, dependencies
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.parameters import global_parameters
from megatron_pipeweaver.planner.planner import Planner
from megatron_pipeweaver.plugin.stages import MegatronStages, StepContext, sum_in_order
from megatron_pipeweaver.runtime.stage import split_backwards
from tests.distributed.training import (
    Case,
    OneProcess,
    RandomCosts,
    forward_step,
    masked_mean,
    masked_sum,
    random_batch,
)
from tests.unit.models.examples import batch, cut, describe, language_only, vision_language

F, B, W = OpKind.F, OpKind.B, OpKind.W

IMAGES = Case(spec=vision_language(), layout=cut(2, vision=(2, 1), language=(2, 1, 1, 1)))
TEXT = Case(spec=language_only(layers=2), layout=cut(1, language=(2,)))
CASES = {
    "two ranks": IMAGES,
    "two ranks, tokens": Case(
        spec=vision_language(tied=True),
        layout=cut(2, vision=(1, 1, 1, 0), language=(2, 3)),
        images_per_pass=1,
        per_token_loss=True,
    ),
    "three ranks, frozen": Case(
        spec=vision_language(frozen=True, vision_layers=3, language_layers=6),
        layout=cut(3, vision=[1] * 3, language=[1] * 6),
    ),
    "24 ranks": Case(
        spec=vision_language(vision_layers=5, language_layers=30),
        layout=cut(24, vision=[0, 0, 0, 0, 1] * 4 + [0, 0, 0, 1], language=[1] * 30 + [0] * 18),
    ),
}


class Ranks:
    """Every rank's stages of one iteration of `case`; `calls[r]` are rank r's forward steps."""

    def __init__(self, case, groups, microbatches, plan, **settings):
        self.case = case
        self.models = []
        self.calls = [[] for _ in range(case.layout.pipeline_size)]
        self.stages = []
        self.gauges = []
        for rank, calls in enumerate(self.calls):
            chunks = build_chunks(
                case.spec, case.layout, case.options, pg_collection=groups, rank=rank
            )
            config = chunks[0].config
            config.calculate_per_token_loss = case.per_token_loss
            config.deallocate_pipeline_outputs = settings.get("deallocate", True)
            context = StepContext(
                forward_step_func=partial(self._step, calls),
                model=chunks,
                microbatches=microbatches,
                config=config,
                forward_only=settings.get("forward_only", False),
                collect_non_loss_data=False,
                first_val_step=settings.get("first_val_step"),
            )
            self.models.append(chunks)
            gauge = settings["gauge"](chunks) if "gauge" in settings else None
            self.gauges.append(gauge)
            self.stages.append(MegatronStages(context, case.layout, plan, gauge))
        self._microbatches = microbatches

    def _step(self, calls, iterator, model):
        loss = masked_sum if self.case.per_token_loss else masked_mean
        microbatch = next(iterator)
        calls.append((model.vp_stage, next(_places(self._microbatches, microbatch))))
        with pytest.raises(StopIteration):
            next(iterator)
        return forward_step(loss, iter([microbatch]), model)

    def gradients(self):
        return {
            name: torch.zeros_like(one) if one.grad is None else one.grad
            for chunks in self.models
            for name, one in global_parameters(chunks)
            if one.requires_grad
        }


def _places(microbatches, wanted):
    return (index for index, one in enumerate(microbatches) if one is wanted)


def plan_for(case, microbatches, *, seed=0, forward_only=False, split=False):
    planner = Planner(
        model=case.spec,
        layout=case.layout,
        costs=RandomCosts(seed=seed),
        sub_microbatch={one.name: case.images_per_pass for one in case.spec.modules[:-1]},
        memory_capacity_bytes=(30_000,) * case.layout.pipeline_size,
        dtypes={one.name: "float64" for one in case.spec.modules},
        search=SearchConfig(
            time_budget_ns=10_000_000,
            max_rounds=5,
            seed=seed,
            deterministic=True,
            split_weight_grad=split,
        ),
    )
    metadata = BatchMetadata(microbatches=tuple(map(describe, microbatches)))
    return planner.plan(metadata, forward_only=forward_only).plan.plan


def run_all(plan, stages):
    """Run every rank's compute actions in the order of the plan, once their inputs are there."""
    graph, passes = plan.graph(), {one.key: one for one in plan.passes}
    left = [[one for one in rank if isinstance(one, ComputeAction)] for rank in plan.ranks]
    outputs, grads = {}, {}
    while any(left):
        before = sum(map(len, left))
        for rank, actions in enumerate(left):
            while actions and _ready(graph, actions[0].op, outputs):
                action = actions.pop(0)
                op, one = action.op, passes[action.op.owner]
                waits = [each.op for each in dependencies(graph, op) if each.carries_data]
                if op.kind is F:
                    given = tuple(outputs[source] for source in waits)
                    outputs[op] = stages[rank].forward(one, op, action.strategy, given)
                    assert not outputs[op].requires_grad
                    continue
                if op.kind is W:
                    stages[rank].weight_grad(one, op)
                    outputs[op] = None
                    continue
                given = tuple(grads.pop((source, op)) for source in waits)
                found = stages[rank].backward(one, op, action.strategy, given)
                outputs[op] = None
                waits = dependencies(graph, op.with_kind(F))
                producers = [each.op for each in waits if each.carries_data]
                for producer, grad in zip(producers, found, strict=True):
                    frozen = graph.nodes[producer.owner].frozen
                    assert (grad is None) == frozen
                    if not frozen:
                        assert grad.shape == outputs[producer].shape
                        grads[op, producer.with_kind(B)] = grad
        assert sum(map(len, left)) < before, "the plan does not go on"
    assert not grads


def _ready(graph, op, done):
    return all(wait.op in done for wait in dependencies(graph, op))


def text_pass(microbatch):
    return PlanPass(
        key=PassKey(microbatch, "language", 0),
        stages=1,
        after=(),
        frozen=False,
        payload=PassPayload(item_start=0, item_stop=1, hidden_shape=(), output_shape=()),
    )


def text_op(kind, microbatch):
    return OpKey(kind, microbatch, "language", 0, 0)


def text_ranks(groups, count=3, case=TEXT, split=(), **settings):
    """One rank that holds a whole language model."""
    microbatches = [batch(0, samples=1, seed=seed) for seed in range(count)]
    plan = SimpleNamespace(passes=tuple(map(text_pass, range(count))), ranks=split)
    return Ranks(case, groups, microbatches, plan, **settings), microbatches


def forward_text(ranks, microbatch):
    return ranks.stages[0].forward(text_pass(microbatch), text_op(F, microbatch), "keep", ())


# --- whole iterations ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_together_equal_one_process_bit_by_bit(groups, name, split):
    case = CASES[name]
    microbatches = [*random_batch(random.Random(len(name))), batch(3, seed=1), batch(0, seed=2)]
    plans = (plan_for(case, microbatches, seed=seed, split=split) for seed in range(20))
    plan = next(plan for plan in plans if bool(split_backwards(plan)) == split)
    ranks = Ranks(case, groups, microbatches, plan)
    run_all(plan, ranks.stages)
    divisor = 1 if case.per_token_loss else len(microbatches)
    losses, grads = OneProcess(case, groups).step(microbatches, divisor)

    assert all(not stages.losses() for stages in ranks.stages[:-1])
    found = ranks.stages[-1].losses()
    assert len(found) == len(losses)
    for one, loss in zip(found, losses, strict=True):
        assert torch.equal(one["lm loss"], loss)
    ours = ranks.gradients()
    assert ours.keys() == grads.keys()
    assert all(torch.equal(ours[key], grads[key]) for key in grads)
    assert any(grad.any() for grad in grads.values())
    assert all(not stages._alive for stages in ranks.stages), "every forward met its backward"
    assert all(not stages._left_out for stages in ranks.stages), "every B its W"
    tokens = sum(int(one["loss_mask"].sum()) for one in microbatches)
    counted = [int(stages.num_tokens) for stages in ranks.stages]
    assert counted == [0] * (len(counted) - 1) + [tokens if case.per_token_loss else 0]


def test_forward_steps_run_in_the_order_of_the_plan_on_the_chunks_it_names(groups):
    microbatches = [*random_batch(random.Random(4)), batch(5, seed=1), batch(1, seed=2)]
    plan = plan_for(IMAGES, microbatches, seed=3)
    ranks = Ranks(IMAGES, groups, microbatches, plan)
    run_all(plan, ranks.stages)
    for calls, actions in zip(ranks.calls, plan.ranks, strict=True):
        ops = [one.op for one in actions if isinstance(one, ComputeAction)]
        assert calls == [
            (IMAGES.layout.virtual_stage(op.module, op.stage), op.microbatch)
            for op in ops
            if op.kind is F
        ]
        assert len(calls) > len(microbatches) * 2


def test_evaluation_keeps_nothing_and_gives_the_same_losses(groups):
    microbatches = [batch(2, seed=1), batch(0, seed=2), batch(4, seed=3)]
    trained = plan_for(IMAGES, microbatches)
    first = Ranks(IMAGES, groups, microbatches, trained)
    run_all(trained, first.stages)
    plan = plan_for(IMAGES, microbatches, forward_only=True)
    ranks = Ranks(IMAGES, groups, microbatches, plan, forward_only=True)
    run_all(plan, ranks.stages)
    assert not any(grad.any() for grad in ranks.gradients().values())
    assert all(not stages._alive for stages in ranks.stages)
    assert ranks.stages[-1].losses() == first.stages[-1].losses() != []


# --- single steps --------------------------------------------------------------------------------


def test_losses_stand_in_the_order_of_microbatches(groups):
    ranks, _ = text_ranks(groups)
    for microbatch in (2, 0, 1):
        forward_text(ranks, microbatch)
    found = ranks.stages[0].losses()
    in_order, _ = text_ranks(groups)
    for microbatch in (0, 1, 2):
        forward_text(in_order, microbatch)
    assert found == in_order.stages[0].losses()
    assert len({float(one["lm loss"]) for one in found}) == 3


@pytest.mark.parametrize(
    ("forward_only", "first_val_step", "times"),
    [(False, None, 1), (False, False, 1), (True, None, 1), (True, True, 1), (True, False, 0)],
)
def test_a_chunk_hears_once_of_its_first_microbatch(groups, forward_only, first_val_step, times):
    microbatches = [batch(5, seed=1), batch(0, seed=2), batch(3, seed=3)]
    plan = plan_for(IMAGES, microbatches, forward_only=forward_only)
    ranks = Ranks(
        IMAGES,
        groups,
        microbatches,
        plan,
        forward_only=forward_only,
        first_val_step=first_val_step,
    )
    told = Counter()
    for chunks, calls in zip(ranks.models, ranks.calls, strict=True):
        for chunk in chunks:
            key = (id(calls), chunk.vp_stage)
            told[key] = 0

            def tell(key=key, calls=calls, chunk=chunk):
                told[key] += 1
                assert chunk.vp_stage not in [stage for stage, _ in calls], "not its first"

            chunk.set_is_first_microbatch = tell
    run_all(plan, ranks.stages)
    assert list(told.values()) == [times] * 6


def test_tokens_of_a_loss_per_token_are_counted(groups):
    case = Case(spec=TEXT.spec, layout=TEXT.layout, per_token_loss=True)
    ranks, microbatches = text_ranks(groups, case=case)
    counts = []
    for index in range(3):
        forward_text(ranks, index)
        counts.append(int(ranks.stages[0].num_tokens))
    tokens = [int(one["loss_mask"].sum()) for one in microbatches]
    assert counts == [sum(tokens[: index + 1]) for index in range(3)]
    assert min(tokens) > 0


def backbone_entry(groups, frozen=(False, False), deallocate=True):
    """The backbone's first stage behind two vision passes of a microbatch of two images."""
    keys = [PassKey(0, "vision", sub) for sub in range(2)]

    def one(key, after, is_frozen):
        payload = PassPayload(item_start=0, item_stop=1, hidden_shape=(), output_shape=())
        return PlanPass(key=key, stages=4, after=after, frozen=is_frozen, payload=payload)

    language = one(PassKey(0, "language", 0), tuple(keys), False)
    producers = [one(key, (), flag) for key, flag in zip(keys, frozen, strict=True)]
    plan = SimpleNamespace(passes=(*producers, language), ranks=())
    ranks = Ranks(IMAGES, groups, [batch(2, seed=1)], plan, deallocate=deallocate)
    stages = ranks.stages[0]
    op = OpKey(F, 0, "language", 0, 0)
    generator = torch.Generator().manual_seed(5)
    features = tuple(
        torch.randn(4, 1, 12, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    output = stages.forward(language, op, "keep", features)
    return ranks, stages, language, op, features, output


def test_a_frozen_producer_gets_no_gradient(groups):
    _, stages, one, op, features, output = backbone_entry(groups, frozen=(True, False))
    first, second = stages.backward(one, op.with_kind(B), "keep", (torch.ones_like(output),))
    assert first is None
    assert second.shape == features[1].shape
    assert second.any()


def test_gradients_of_several_consumers_are_added(groups):
    _, stages, one, op, _, output = backbone_entry(groups)
    parts = (torch.ones_like(output), torch.linspace(0, 1, output.numel()).view_as(output).double())
    apart = stages.backward(one, op.with_kind(B), "keep", parts)
    _, stages, *_ = backbone_entry(groups)
    together = stages.backward(one, op.with_kind(B), "keep", (parts[0] + parts[1],))
    assert all(map(torch.equal, apart, together))
    assert len(apart) == 2


def test_where_every_consumer_is_frozen_zeros_flow_back_and_weights_get_nothing(groups):
    ranks, stages, one, op, features, _ = backbone_entry(groups)
    found = stages.backward(one, op.with_kind(B), "keep", ())
    assert [tuple(grad.shape) for grad in found] == [tuple(each.shape) for each in features]
    assert not any(grad.any() for grad in found)
    assert not any(grad.any() for grad in ranks.gradients().values())


def test_inputs_are_not_tied_to_the_senders_graph(groups):
    _, stages, one, op, features, output = backbone_entry(groups)
    stages.backward(one, op.with_kind(B), "keep", (torch.ones_like(output),))
    assert all(each.grad is None and not each.requires_grad for each in features)


@pytest.mark.parametrize("deallocate", [True, False])
def test_an_output_that_was_handed_on_is_let_go_of(groups, deallocate):
    _, stages, _, op, _, output = backbone_entry(groups, deallocate=deallocate)
    graph_end = stages._alive[op.owner, op.stage].output
    assert output.shape == (15, 1, 12)
    assert not output.requires_grad
    assert graph_end.numel() == (1 if deallocate else output.numel())
    assert graph_end.grad_fn is not None


def test_the_loss_is_kept(groups):
    ranks, _ = text_ranks(groups)
    loss = forward_text(ranks, 0)
    graph_end = ranks.stages[0]._alive[PassKey(0, "language", 0), 0].output
    assert torch.equal(loss, graph_end)
    reported = ranks.stages[0].losses()[0]["lm loss"]
    assert torch.equal(loss, reported / 3)
    assert ranks.stages[0].backward(text_pass(0), text_op(B, 0), "keep", ()) == ()
    assert all(grad.any() for grad in ranks.gradients().values())


def split_text(groups, strategy="keep"):
    """A text microbatch behind its split backward, and the names that have gradients by then."""
    action = ComputeAction(
        kind=ActionKind.WG_STAGE, op=text_op(W, 0), strategy=strategy, memory_bytes=0
    )
    ranks, _ = text_ranks(groups, split=((action,),))
    ranks.stages[0].forward(text_pass(0), text_op(F, 0), strategy, ())
    ranks.stages[0].backward(text_pass(0), text_op(B, 0), strategy, ())
    return ranks, {name for name, grad in ranks.gradients().items() if grad.any()}


def test_a_split_backward_leaves_the_linears_weights_to_w(groups):
    ranks, early = split_text(groups)
    linears = {
        name
        for name in ranks.gradients()
        if ("linear_" in name and name.endswith("weight")) or "output_layer" in name
    }
    assert len(linears) == 2 * 4 + 1
    assert early == set(ranks.gradients()) - linears
    ranks.stages[0].weight_grad(text_pass(0), text_op(W, 0))
    unsplit, _ = text_ranks(groups)
    forward_text(unsplit, 0)
    unsplit.stages[0].backward(text_pass(0), text_op(B, 0), "keep", ())
    whole = unsplit.gradients()
    assert all(torch.equal(grad, whole[name]) for name, grad in ranks.gradients().items())


def test_recomputed_layers_hold_nothing_for_w(groups):
    ranks, early = split_text(groups, "recompute")
    assert set(ranks.gradients()) - early == {"language_model.output_layer.weight"}
    ranks.stages[0].weight_grad(text_pass(0), text_op(W, 0))
    assert all(grad.any() for grad in ranks.gradients().values())


def test_what_is_left_out_is_let_go_of_by_w(groups):
    ranks, _ = split_text(groups)
    (left_out,) = ranks.stages[0]._left_out.values()
    held = [weakref.ref(one) for one in left_out.tensors()]
    assert len(held) == 2 * (2 * 4 + 1)
    ranks.stages[0].weight_grad(text_pass(0), text_op(W, 0))
    del left_out
    assert not any(one() is not None for one in held)


def test_gradients_are_added_from_left_to_right():
    big, small = torch.tensor(1e16, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    assert sum_in_order([big, small, -big]) == 0
    assert sum_in_order([big, -big, small]) == 1
    assert sum_in_order([small]) is small
    assert sum_in_order([]) is None
