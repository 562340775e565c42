"""Imports a Hugging Face checkpoint, LLaVA or Qwen2-VL, into one that Megatron's ``--load`` takes.

    python scripts/import_hf.py CHECKPOINT -o OUT

CHECKPOINT is a folder with `config.json` and `*.safetensors`. How to train from OUT stands in
`docs/megatron.md`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_pipeweaver.errors import PipeWeaverError
from megatron_pipeweaver.plugin.import_hf import import_checkpoint

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str]) -> int:
    """Import as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the Hugging Face checkpoint")
    parser.add_argument("-o", "--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--dtype", choices=_TYPES, default="fp32", help="of the parameters written")
    args = parser.parse_args(arguments)
    try:
        model = import_checkpoint(args.checkpoint, args.out, _TYPES[args.dtype])
    except PipeWeaverError as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return error.exit_code
    layers = ", ".join(f"{one.layers} layers of {one.name}" for one in model.spec.modules)
    print(f"{args.out}: {model.architecture} with {layers}; train with --load {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
