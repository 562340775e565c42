"""The planner's process as its parent sees it: started, talked to, ended, started again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megatron_pipeweaver
from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.planner.channel import Channel

# `-P` keeps the working directory from standing in front of the installed packages.
PLANNER_COMMAND = (sys.executable, "-P", "-m", "megatron_pipeweaver.planner.process")
"""Starts the planner; the socket that it inherits and the process that starts it follow."""

_FAREWELL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A running process and the channel to it."""

    process: subprocess.Popen[bytes]
    channel: Channel

    def end(self) -> None:
        """End the process, whatever it does, and reap it."""
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def leave(self) -> None:
        """Close the channel, at which the process ends by itself; if it does not, end it."""
        self.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_FAREWELL_S)
        self.end()


def start_child(command: Sequence[str] = PLANNER_COMMAND) -> Child:
    """A new process of `command` in a session of its own, so that no Ctrl-C reaches it.

    Raises:
        OSError: it cannot be started.
    """
    ours, theirs = socket.socketpair()
    source = str(Path(megatron_pipeweaver.__file__).parents[1])
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Child(process=process, channel=Channel(ours))


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How often a planner that failed is started again, and when.

    At most `most` times in all, the first after `backoff_ns`, each further one after twice the
    time.
    """

    most: int = 5
    backoff_ns: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.most < 0 or self.backoff_ns < 0:
            raise ConfigError(
                f"planner restarts: most={self.most}, backoff_ns={self.backoff_ns}; need >= 0"
            )

    def delay_ns(self, failures: int) -> int | None:
        """How long to wait after that many failures; `None` when it is time to give up."""
        return None if failures > self.most else self.backoff_ns << (failures - 1)
