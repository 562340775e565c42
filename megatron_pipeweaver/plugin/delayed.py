"""Whether plans may give weight gradients ops of their own, by Megatron's arguments."""

from __future__ import annotations

import argparse

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.utils import is_te_min_version


def splits_backwards(args: argparse.Namespace) -> bool:
    """Whether the layers can leave their weight gradients to ``W`` ops.

    Megatron's own can, and Transformer Engine's since its version 2.3 (a dry run does without it),
    but for what `models.delayed` leaves to ``B``.
    """
    if args.transformer_impl == "local":
        return True
    gathers = args.sequence_parallel and args.tensor_model_parallel_size > 1
    makes_room = args.moe_grouped_gemm and not args.gradient_accumulation_fusion
    if gathers or makes_room or args.tp_comm_overlap:
        return False
    return not HAVE_TE or bool(is_te_min_version("2.3.0"))
