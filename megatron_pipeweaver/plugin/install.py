"""The only place that changes Megatron from outside.

A fork that carries one of the patches of `patches/` asks for the schedule itself, and is left
unchanged. Elsewhere:

`get_forward_backward_func` picks one of three functions of its own module by name at each call.
Replacing those three names therefore reaches every caller, however the function was imported, and
leaves `get_forward_backward_func` itself, and every module that holds it, untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.pipeline_parallel import schedules

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.compat import check_version
from megatron_pipeweaver.plugin.cpu import cpu_patches
from megatron_pipeweaver.plugin.patching import Patch, PatchSet
from megatron_pipeweaver.plugin.schedule import PipeWeaverSchedule

SCHEDULE_NAMES = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)

FORK_HOOK = "pipeweaver_schedule"
"""The name in `schedules` by which a patched fork asks for a schedule in place of its own."""


class InstalledSchedule:
    """Stands where one of Megatron's schedule functions stood.

    Runs models made of PipeWeaver's chunks through PipeWeaver, and any other model through
    Megatron's own function.
    """

    def __init__(self, ours: PipeWeaverSchedule, original: Callable[..., Any]) -> None:
        self._ours = ours
        self.original = original
        self.__doc__ = original.__doc__

    def __call__(self, **arguments: Any) -> Any:
        """Megatron's signature, keyword-only."""
        if self._ours.owns(arguments.get("model", ())):
            return self._ours(**arguments)
        return self.original(**arguments)


def install(schedule: PipeWeaverSchedule) -> None:
    """Make Megatron train PipeWeaver's models by `schedule`.

    Raises:
        ConfigError: a schedule is installed already.
        UnsupportedMegatronError: this megatron-core version is not one PipeWeaver knows.
    """
    check_version()
    installed = [getattr(schedules, name) for name in SCHEDULE_NAMES]
    if getattr(schedules, FORK_HOOK, None) or any(
        isinstance(one, InstalledSchedule) for one in installed
    ):
        raise ConfigError("PipeWeaver is installed already; call uninstall() first")
    if is_patched_fork():
        setattr(schedules, FORK_HOOK, partial(InstalledSchedule, schedule))
        return
    PatchSet(
        Patch(schedules, name, InstalledSchedule(schedule, getattr(schedules, name)))
        for name in SCHEDULE_NAMES
    ).apply()


def uninstall() -> None:
    """Give Megatron its own schedule functions back; does nothing where none was replaced."""
    if is_patched_fork():
        setattr(schedules, FORK_HOOK, None)
    for name in SCHEDULE_NAMES:
        installed = getattr(schedules, name)
        if isinstance(installed, InstalledSchedule):
            setattr(schedules, name, installed.original)


def is_patched_fork() -> bool:
    """Whether this Megatron carries a patch of `patches/`."""
    return hasattr(schedules, FORK_HOOK)


def run_on_cpu() -> PatchSet:
    """Let megatron-core's CUDA calls work on a machine without a GPU.

    Does nothing where CUDA is available.

    Returns:
        What was changed; its `restore` undoes it.
    """
    patches = PatchSet(cpu_patches())
    patches.apply()
    return patches
