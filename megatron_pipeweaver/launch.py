"""Runs an unmodified training script of Megatron-LM's shape with PipeWeaver's flags.

    torchrun ... -m megatron_pipeweaver.launch pretrain_vlm.py ARGUMENTS --pipeweaver

The script is run as ``python pretrain_vlm.py ARGUMENTS`` would run it: as ``__main__``, its own
folder first on the path. Without ``--pipeweaver`` it trains as ever.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_pipeweaver.errors import ConfigError, PipeWeaverError

_USAGE = "python -m megatron_pipeweaver.launch SCRIPT.py [ARGUMENTS OF THE SCRIPT]"


def main(arguments: Sequence[str]) -> int:
    """Run a script with hooks; returns the exit code.

    Args:
        arguments: the script's path, and its own arguments.
    """
    try:
        launch(arguments)
    except PipeWeaverError as error:
        # What is wrong with the arguments is wrong on every rank alike.
        if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
            sys.stderr.write(f"megatron_pipeweaver.launch: {error}\n")
        return error.exit_code
    return 0


def launch(arguments: Sequence[str]) -> None:
    """Run a script with hooks.

    Raises:
        ConfigError: there is no such script.
    """
    if not arguments:
        raise ConfigError(f"no script; usage: {_USAGE}")
    script = Path(arguments[0])
    if not script.is_file():
        raise ConfigError(f"{script}: no such script; usage: {_USAGE}")
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # see plugin.cpu
    # In front of all imports: a Megatron-LM checkout's own `megatron` stands beside its scripts.
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [str(one) for one in arguments]
    from megatron_pipeweaver.plugin.llava import Llava
    from megatron_pipeweaver.plugin.training import megatron_training

    with megatron_training(Llava()):
        runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
