"""Hooks in, hooks out, and nothing else of Megatron touched."""

import subprocess
import sys

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func as imported_early

from megatron_pipeweaver.errors import ConfigError, UnsupportedMegatronError
from megatron_pipeweaver.plugin.install import (
    FORK_HOOK,
    SCHEDULE_NAMES,
    InstalledSchedule,
    install,
    run_on_cpu,
    uninstall,
)
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule
from tests.unit.planner.examples import make_planner

ORIGINALS = {name: getattr(schedules, name) for name in SCHEDULE_NAMES}
EVERYTHING = dict(vars(schedules))
SIZES = [(1, None), (24, None), (24, 3)]


class Chunk(torch.nn.Module):
    """What makes a model PipeWeaver's."""

    place = "here"


class Wrapper(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


class Told(PipeWeaverSchedule):
    """Remembers its arguments instead of training."""

    def __init__(self):
        super().__init__(make_planner(), lambda one: pytest.fail("described"))
        self.arguments = []

    def __call__(self, **arguments):
        self.arguments.append(arguments)
        return ["ours"]


@pytest.fixture
def schedule():
    yield Told()
    uninstall()


@pytest.fixture(params=SIZES, ids=str)
def pipeline(request, monkeypatch):
    """Megatron's parallel state, which picks one of its three functions."""
    size, virtual = request.param
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: size)
    monkeypatch.setattr(
        parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual
    )


def test_functions_imported_before_find_ours_and_afterwards_megatrons_own(schedule, pipeline):
    before = get_forward_backward_func()
    assert before in ORIGINALS.values()
    install(schedule)
    for get in (imported_early, get_forward_backward_func, schedules.get_forward_backward_func):
        found = get()
        assert isinstance(found, InstalledSchedule)
        assert found(model=[Chunk(), Wrapper(Chunk())], num_microbatches=3) == ["ours"]
        assert schedule.arguments.pop().keys() == {"model", "num_microbatches"}
    assert get_forward_backward_func().original is before
    uninstall()
    assert imported_early() is before
    assert vars(schedules) == EVERYTHING


def test_nothing_but_the_three_functions_is_replaced(schedule):
    install(schedule)
    changed = {name for name, value in vars(schedules).items() if EVERYTHING[name] is not value}
    assert changed == set(SCHEDULE_NAMES)
    for name in SCHEDULE_NAMES:
        assert getattr(schedules, name).__doc__ == ORIGINALS[name].__doc__


def test_uninstall_twice_or_without_install_does_nothing(schedule):
    uninstall()
    install(schedule)
    uninstall()
    uninstall()
    assert all(getattr(schedules, name) is ORIGINALS[name] for name in SCHEDULE_NAMES)


def test_a_second_install_is_refused_and_leaves_the_first(schedule):
    install(schedule)
    first = [getattr(schedules, name) for name in SCHEDULE_NAMES]
    with pytest.raises(ConfigError, match="installed already"):
        install(Told())
    assert [getattr(schedules, name) for name in SCHEDULE_NAMES] == first
    uninstall()
    install(Told())


def test_an_unknown_version_changes_nothing(schedule, monkeypatch):
    def refuse():
        raise UnsupportedMegatronError("megatron-core 9.9.9")

    monkeypatch.setattr("megatron_pipeweaver.plugin.install.check_version", refuse)
    with pytest.raises(UnsupportedMegatronError, match=r"9\.9\.9"):
        install(schedule)
    assert vars(schedules) == EVERYTHING


@pytest.mark.parametrize(
    "model",
    [
        torch.nn.Linear(1, 1),
        [torch.nn.Linear(1, 1)],
        Wrapper(torch.nn.Linear(1, 1)),
        [Chunk(), torch.nn.Linear(1, 1)],
        [],
    ],
    ids=["module", "list", "wrapped", "mixed", "empty"],
)
def test_other_models_go_to_megatrons_function_as_they_came(schedule, pipeline, monkeypatch, model):
    calls = []
    original = get_forward_backward_func()
    monkeypatch.setattr(
        schedules,
        original.__name__,
        lambda **arguments: calls.append(arguments) or "Megatron's",
    )
    install(schedule)
    arguments = {"model": model, "data_iterator": object(), "num_microbatches": 4}
    assert get_forward_backward_func()(**arguments) == "Megatron's"
    uninstall()
    (found,) = calls
    assert found.keys() == arguments.keys()
    assert all(found[name] is value for name, value in arguments.items())
    assert not schedule.arguments


def test_models_are_ours_when_all_their_chunks_are(schedule):
    assert schedule.owns(Chunk())
    assert schedule.owns(Wrapper(Wrapper(Chunk())))
    assert schedule.owns([Chunk(), Wrapper(Chunk())])
    assert not schedule.owns([Wrapper(Chunk()), Wrapper(torch.nn.Linear(1, 1))])


def test_a_call_without_a_model_fails_as_megatrons_own(schedule, pipeline):
    install(schedule)
    with pytest.raises(TypeError, match=r"missing .* required keyword-only"):
        get_forward_backward_func()(num_microbatches=1)


def test_importing_the_plugin_changes_neither_megatron_nor_torch():
    script = """
import torch, pkgutil, importlib
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
held = (schedules, parallel_state, random, torch, torch.cuda, torch.Tensor, torch.nn.Module)
before = [dict(vars(one)) for one in held]
import megatron_pipeweaver.plugin as plugin
names = [one.name for one in pkgutil.iter_modules(plugin.__path__)]
for name in names:
    importlib.import_module(f"megatron_pipeweaver.plugin.{name}")
for one, names_before in zip(held, before):
    now = vars(one)
    changed = [name for name in names_before if now.get(name) is not names_before[name]]
    assert not changed, (one, changed)
print(*names)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {"install", "schedule", "stages", "compat", "cpu"} <= set(done.stdout.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_run_on_cpu_is_undone():
    before = torch.cuda.current_device, torch.empty, torch.Tensor.cuda
    with run_on_cpu() as patches:
        assert patches.applied
        assert torch.cuda.current_device() == torch.device("cpu")
    assert (torch.cuda.current_device, torch.empty, torch.Tensor.cuda) == before


def test_the_installed_names_are_those_that_megatron_picks_from():
    picked = set(get_forward_backward_func.__code__.co_names)
    assert set(SCHEDULE_NAMES) <= picked


def test_a_patched_fork_asks_for_the_schedule_and_is_left_unchanged(schedule, monkeypatch):
    monkeypatch.setattr(schedules, FORK_HOOK, None, raising=False)
    install(schedule)
    assert all(getattr(schedules, name) is ORIGINALS[name] for name in SCHEDULE_NAMES)
    chosen = get_forward_backward_func(pp_size=2)
    found = getattr(schedules, FORK_HOOK)(chosen)
    assert found(model=[Chunk()]) == ["ours"]
    assert found.original is chosen
    with pytest.raises(ConfigError, match="installed already"):
        install(schedule)
    uninstall()
    assert getattr(schedules, FORK_HOOK) is None
