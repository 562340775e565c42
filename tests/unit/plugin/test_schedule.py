"""What the schedule function does around an iteration, without any rank."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_pipeweaver.errors import ConfigError, UnsupportedMegatronError
from megatron_pipeweaver.ir.batch import MicrobatchMetadata
from megatron_pipeweaver.planner.planner import batch_digest
from megatron_pipeweaver.planner.wire import decode
from megatron_pipeweaver.plugin.duties import (
    UNSUPPORTED_OPTIONS,
    finish_gradients,
    refuse_unsupported,
)
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from megatron_pipeweaver.plugin.sharing import SharedBatch
from tests.unit.planner.examples import make_planner

# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", UNSUPPORTED_OPTIONS)
def test_an_unsupported_option_is_refused_by_its_flag(field):
    flag = "--" + field.replace("_", "-")
    with pytest.raises(UnsupportedMegatronError, match=f"^{flag}: .*leave the flag out"):
        refuse_unsupported(SimpleNamespace(**{field: True}), None)
    refuse_unsupported(SimpleNamespace(**{field: False}), None)


def test_cuda_graphs_are_refused_by_their_kind():
    with pytest.raises(UnsupportedMegatronError, match=r"^--cuda-graph-impl local: "):
        refuse_unsupported(SimpleNamespace(cuda_graph_impl="local"), None)
    for off in (None, "none"):
        refuse_unsupported(SimpleNamespace(cuda_graph_impl=off), None)


def test_adjusted_shapes_are_refused():
    with pytest.raises(UnsupportedMegatronError, match=r"^adjust_tensor_shapes_fn: "):
        refuse_unsupported(SimpleNamespace(), lambda *shapes: shapes)


def test_a_call_with_an_unsupported_option_touches_no_rank():
    class Chunk(torch.nn.Module):
        place = "here"
        config = SimpleNamespace(hybrid_context_parallel=True)

    schedule = PipeWeaverSchedule(make_planner(), lambda one: pytest.fail("described"))
    with pytest.raises(UnsupportedMegatronError, match="--hybrid-context-parallel"):
        schedule(
            forward_step_func=None,
            data_iterator=iter([]),
            model=[Chunk()],
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
        )


# --- batch and plan on one rank ------------------------------------------------------------------


def metadata(microbatch):
    return MicrobatchMetadata(sequence_length=microbatch["length"])


def made(schedule, iterator, count=2):
    load = schedule._load(iterator, count)
    batch = SharedBatch(planned=load.batch, own=load.batch, failure=load.failure)
    return load, *schedule._make_plan(batch, forward_only=False)


def test_a_batch_becomes_a_plan_of_its_own_digest():
    schedule = PipeWeaverSchedule(make_planner(), metadata)
    load, planned, message = made(schedule, iter([{"length": 8}, {"length": 9}]))
    received = decode(message)
    assert received.plan.fingerprint == planned.planned().plan.fingerprint
    assert received.batch_digest == batch_digest(load.batch)
    assert load.failure == ""


def test_a_rank_without_data_says_so_when_it_has_to_plan():
    schedule = PipeWeaverSchedule(make_planner(), metadata)
    _, planned, message = made(schedule, None)
    assert planned is None
    with pytest.raises(ConfigError, match="no plan: it loads no data; give the first pipeline"):
        decode(message)


class StrangeError(Exception):
    """Of another library, over two lines, and not even text."""

    def __str__(self):
        return "first line\nsecond \udcff line"


def fail(*_, **__):
    raise StrangeError


@pytest.mark.parametrize(
    "place", ["describe", "planner.plan", "encode"], ids=lambda place: f"in {place}"
)
def test_whatever_fails_on_the_planning_rank_reaches_the_others_on_one_line(
    monkeypatch, caplog, place
):
    # What is logged cannot be encoded, and pytest's workers hand captured logs on as UTF-8.
    caplog.set_level(logging.CRITICAL, logger="megatron_pipeweaver")
    schedule = PipeWeaverSchedule(make_planner(), fail if place == "describe" else metadata)
    if place == "planner.plan":
        monkeypatch.setattr(schedule._source.planner, "plan", fail)
    if place == "encode":
        monkeypatch.setattr("megatron_pipeweaver.planner.source.encode", fail)
    _, planned, message = made(schedule, iter([{"length": 8}, {"length": 9}]))
    assert planned is None
    with pytest.raises(ConfigError) as caught:
        decode(message)
    assert str(caught.value) == (
        r"the planning rank has no plan: StrangeError: first line second \udcff line"
    )
    assert json.loads(message)["failure"]


def test_a_loader_that_ends_early_is_told_of():
    schedule = PipeWeaverSchedule(make_planner(), metadata)
    load, _, message = made(schedule, iter([{"length": 8}]))
    assert load.failure.startswith("ConfigError: data iterator: ended at microbatch 1 of 2")
    with pytest.raises(ConfigError, match="ended at microbatch 1 of 2"):
        decode(message)


def test_copies_of_all_iterations_run_on_one_stream(monkeypatch):
    monkeypatch.setattr("megatron_pipeweaver.plugin.schedule.copy_stream", object)
    schedule = PipeWeaverSchedule(make_planner(), metadata)
    assert schedule._copy_stream() is schedule._copy_stream()


# --- gradients -----------------------------------------------------------------------------------


class Synced(torch.nn.Module):
    def __init__(self, name, log, overlap, embeds=False):
        super().__init__()
        self.name, self.log, self.embeds_tokens = name, log, embeds
        self.ddp_config = SimpleNamespace(overlap_grad_reduce=overlap)
        self.bucket_groups, self.expert_parallel_bucket_groups = [self], []

    def start_grad_sync(self, force_all_reduce):
        self.log.append((self.name, force_all_reduce))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_gradients_are_synced_in_the_order_of_the_chunks_then_finalised(per_token, overlap, whole):
    log, calls = [], []
    names = ["vision0", "vision1", "language0", "language1"]
    chunks = [Synced(name, log, overlap, embeds=name == "language0") for name in names]

    def finalize(*given, **named):
        calls.append((list(log), given, named))

    config = SimpleNamespace(finalize_model_grads_func=finalize, calculate_per_token_loss=per_token)
    tokens, groups = torch.tensor(7), object()
    finish_gradients(chunks, config, tokens, groups, force_all_reduce=whole)
    ((before, (model, counted), named),) = calls
    # Gradients that are to be saved are all-reduced, not scattered, when they are sent on early.
    assert before == ([(name, whole) for name in names] if overlap else [])
    assert [one.name for one in model] == ["language0", "vision0", "vision1", "language1"]
    assert counted is (tokens if per_token else None)
    assert named == {"pg_collection": groups, "force_all_reduce": whole}


def test_without_a_function_to_finalise_them_gradients_stay_with_the_chunks():
    log = []
    config = SimpleNamespace(finalize_model_grads_func=None)
    finish_gradients([Synced("language0", log, True)], config, torch.tensor(0), None, False)
    assert log == []
