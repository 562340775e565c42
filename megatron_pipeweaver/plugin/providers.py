"""Model providers: from Megatron's arguments to a model's specification, chunks and costs."""

from __future__ import annotations

import argparse
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, MLATransformerConfig, TransformerConfig

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.batch import MicrobatchMetadata
from megatron_pipeweaver.ir.layout import ChunkLayout
from megatron_pipeweaver.ir.lmm import ModelSpec
from megatron_pipeweaver.models.build import build_chunks
from megatron_pipeweaver.models.chunk import ModelChunk
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.parameters import initialize_by_name
from megatron_pipeweaver.partition.chunks import make_layout
from megatron_pipeweaver.plugin.data import DescribeMicrobatch

ChunkProvider = Callable[..., torch.nn.Module]
"""Megatron's model provider: called with `pre_process`, `post_process`, `vp_stage`, ..."""


class ModelFamily(Protocol):
    """What PipeWeaver must know of a training script's model."""

    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """The modules that Megatron's arguments describe; `ConfigError` where they do not fit."""
        ...

    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """A full microbatch, by which modules are cut and sub-microbatches sized."""
        ...

    def expected(self, args: argparse.Namespace) -> Sequence[MicrobatchMetadata]:
        """Microbatches as they may come, each as likely as another: ``--pipeweaver-balance``."""
        ...

    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """Reads the metadata off a microbatch of the script's data iterator."""
        ...

    def provider(
        self, args: argparse.Namespace, layout: ChunkLayout, original: ChunkProvider | None
    ) -> ChunkProvider:
        """What takes the place of the script's model provider, and makes one chunk per call."""
        ...


class ChunkFamily(ABC):
    """A model that is made of PipeWeaver's chunks, cut or in one piece; a `ModelFamily`."""

    @abstractmethod
    def spec(self, args: argparse.Namespace) -> ModelSpec:
        """See `ModelFamily`."""

    @abstractmethod
    def typical(self, args: argparse.Namespace) -> MicrobatchMetadata:
        """See `ModelFamily`."""

    def expected(self, args: argparse.Namespace) -> Sequence[MicrobatchMetadata]:
        """See `ModelFamily`; the typical one alone where a family knows no better."""
        return (self.typical(args),)

    @abstractmethod
    def describe(self, args: argparse.Namespace) -> DescribeMicrobatch:
        """See `ModelFamily`."""

    @abstractmethod
    def options(self, args: argparse.Namespace) -> ModelOptions:
        """How the chunks are made."""

    def provider(
        self, args: argparse.Namespace, layout: ChunkLayout, original: ChunkProvider | None = None
    ) -> ChunkProvider:
        """Makes the rank's chunks at the first call, and hands out one per call."""
        del original
        return ChunkSeries(
            lambda groups: build_chunks(
                self.spec(args), layout, self.options(args), pg_collection=groups
            )
        )

    def whole(self, args: argparse.Namespace, pg_collection: Any = None) -> WholeModel:
        """The same model in one piece, for one pipeline rank and Megatron's own schedule.

        Raises:
            ConfigError: the job has several pipeline ranks.
        """
        if args.pipeline_model_parallel_size > 1:
            raise ConfigError(
                f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}: the model "
                "is cut for pipelines by PipeWeaver; add --pipeweaver"
            )
        spec = self.spec(args)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        layout = make_layout(spec, 1, {})
        return WholeModel(build_chunks(spec, layout, self.options(args), pg_collection=groups))


_SIZES: Mapping[str, str] = {
    "hidden_size": "Width of the {what}'s layers.",
    "ffn_hidden_size": "Width of the {what}'s MLPs.",
    "num_attention_heads": "Attention heads of the {what}.",
}
"""An encoder's sizes that have flags of their own, by Megatron's name of the backbone's."""


def add_encoder_sizes(group: Any, name: str, what: str, backbone: str) -> None:
    """Add the flags of an encoder's sizes, ``--NAME-hidden-size`` and its kin.

    Args:
        group: of the parser's arguments.
        name: of the encoder's module.
        what: the encoder, in help.
        backbone: the model that Megatron's own flags describe, in help.
    """
    for size, told in _SIZES.items():
        group.add_argument(
            f"--{name}-{size.replace('_', '-')}",
            type=int,
            help=f"{told.format(what=what)} That of the {backbone} where left out.",
        )


def encoder_sizes(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """An encoder's layers and widths, as fields of its `ModuleSpec`."""
    hidden, ffn, heads = (getattr(args, f"{name}_{size}") or getattr(args, size) for size in _SIZES)
    return {
        "layers": args.encoder_num_layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "attention_heads": heads,
    }


def refuse_missing_layers(args: argparse.Namespace, encoder: str, backbone: str) -> None:
    """Returns where both depths are given.

    Raises:
        ConfigError: one is missing.
    """
    for part, what in {"encoder": encoder, "decoder": backbone}.items():
        if getattr(args, f"{part}_num_layers") is None:
            raise ConfigError(
                f"--{part}-num-layers is missing; give the layers of the {what} with it"
            )


def model_options(
    args: argparse.Namespace, overrides: Mapping[str, Mapping[str, Any]]
) -> ModelOptions:
    """How chunks are made, from Megatron's arguments.

    With ``--use-cpu-initialization`` every parameter starts from a value that its name and
    ``--seed`` determine, however the model is cut; else from Megatron's own random states.

    Args:
        args: Megatron's.
        overrides: fields of `TransformerConfig` that one module has otherwise, by module.
    """
    scaled = getattr(args, "use_rope_scaling", False)
    return ModelOptions(
        params_dtype=args.params_dtype,
        dropout=args.hidden_dropout,
        max_sequence_length=args.max_position_embeddings,
        image_size=args.img_h,
        position_embedding=args.position_embedding_type,
        rotary_base=args.rotary_base,
        rotary_percent=args.rotary_percent,
        rotary_interpolation=args.rotary_seq_len_interpolation_factor,
        rope_scaling_factor=args.rope_scaling_factor if scaled else None,
        transformer_engine=args.transformer_impl == "transformer_engine",
        # Megatron's default is another one than that of `dropout`.
        common={**config_fields(args), "attention_dropout": args.attention_dropout},
        overrides=overrides,
        initialize=(
            partial(initialize_by_name, seed=args.seed) if args.use_cpu_initialization else None
        ),
    )


_OF_ONE_MODULE = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "multi_latent_attention",
        "qk_layernorm",
        "gated_linear_unit",
        "hidden_dropout",
        "params_dtype",
    }
)
"""Fields of `TransformerConfig` that are set for each module."""
_OF_EXPERTS = re.compile(r"moe_|expert_|num_moe_")
"""And those of modules with experts alone."""
_BY_SPEC = frozenset(
    {
        "num_moe_experts",
        "moe_router_topk",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
        "moe_layer_freq",
    }
)
"""Of these, what a module's specification says."""
_LATENT_BY_SPEC = frozenset(
    {
        "multi_latent_attention",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
    }
)
"""And of the fields of latent attention."""


def config_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `TransformerConfig` that Megatron's arguments set for all modules alike.

    Functions are left out: the activation is that of each module, initialisation follows from
    ``init_method_std``. So are pipeline sizes, which every chunk has of its own.
    """
    return {
        name: value for name, value in _given_fields(args).items() if not _OF_EXPERTS.match(name)
    }


def expert_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The further fields of a module with experts that Megatron's arguments set: how they run."""
    if args.num_experts is None:
        return {}
    return {
        name: value
        for name, value in _given_fields(args).items()
        if _OF_EXPERTS.match(name) and name not in _BY_SPEC
    }


def latent_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The further fields of a module with latent attention: how it turns, and other defaults."""
    if not getattr(args, "multi_latent_attention", False):
        return {}
    given, plain = _config(args), TransformerConfig.__dataclass_fields__
    return {
        name: getattr(given, name)
        for name, field in MLATransformerConfig.__dataclass_fields__.items()
        if name not in _LATENT_BY_SPEC
        and (name not in plain or plain[name].default != field.default)
    }


def refuse_language_layers(args: argparse.Namespace, chunks: str) -> None:
    """Returns where the arguments ask for neither experts nor latent attention.

    Args:
        args: Megatron's.
        chunks: what is made without these.

    Raises:
        ConfigError: they do.
    """
    if getattr(args, "multi_latent_attention", False):
        raise ConfigError(
            f"--multi-latent-attention: {chunks} have none; leave it out, or train "
            "scripts/pretrain_vlm.py"
        )
    if getattr(args, "num_experts", None) is not None:
        raise ConfigError(
            f"--num-experts {args.num_experts}: {chunks} have no experts; leave it out, or train "
            "scripts/pretrain_vlm.py"
        )


_NOT_BUILT: Mapping[str, str] = {
    "squared_relu": "their MLPs have GELU, or --swiglu",
    "quick_geglu": "their MLPs have GELU, or --swiglu",
    "init_method_xavier_uniform": "their weights are drawn with --init-method-std",
    "qk_l2_norm": "their queries and keys are not normed by L2",
    "use_mup": "their weights are drawn with --init-method-std",
    "heterogeneous_layers_config_path": "a module's layers are alike",
    "hybrid_layer_pattern": "their layers have attention",
    "experimental_attention_variant": "their attention is Megatron's usual one",
}
"""Megatron's arguments of models that chunks are not, and what they are instead."""


def refuse_other_models(args: argparse.Namespace) -> None:
    """Returns where the arguments describe a model that can be made of PipeWeaver's chunks.

    Raises:
        ConfigError: one of them is for layers of another kind.
    """
    for name, instead in _NOT_BUILT.items():
        value = getattr(args, name, None)
        if value:
            shown = "" if value is True else f" {value}"
            raise ConfigError(
                f"--{name.replace('_', '-')}{shown}: cannot be had in chunks: {instead}; "
                "leave it out"
            )


def _given_fields(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments set that is neither a function nor each module's own."""
    given = _config(args)
    fields = {}
    for name, field in TransformerConfig.__dataclass_fields__.items():
        value = getattr(given, name)
        if name in _OF_ONE_MODULE or "pipeline" in name or callable(value):
            continue
        if value != field.default:
            fields[name] = value
    return fields


def _config(args: argparse.Namespace) -> Any:
    """Megatron's own config of the language model in one piece."""
    from megatron.training.arguments import core_transformer_config_from_args

    alone = argparse.Namespace(**vars(args))
    alone.pipeline_model_parallel_size = 1
    alone.virtual_pipeline_model_parallel_size = None
    alone.num_layers = args.decoder_num_layers
    return core_transformer_config_from_args(alone)


class ChunkSeries:
    """Megatron's model provider for a list of chunks: Megatron asks for them one by one.

    Args:
        build: makes all chunks of this rank, given Megatron's process groups.
    """

    def __init__(self, build: Callable[[Any], Sequence[torch.nn.Module]]) -> None:
        self._build = build
        self._chunks: Sequence[torch.nn.Module] = ()

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: Any = None,
        pg_collection: Any = None,
    ) -> torch.nn.Module:
        """The chunk of `vp_stage`; a new series begins with the first."""
        del pre_process, post_process, config  # every chunk knows its place
        index = vp_stage or 0
        if index == 0:
            groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
            self._chunks = self._build(groups)
        return self._chunks[index]


class WholeModel(MegatronModule):  # type: ignore[misc]
    """All chunks of a model on one pipeline rank as one module; parameters keep their names.

    Args:
        chunks: one chunk per module, in forward order, the backbone last.
    """

    def __init__(self, chunks: Sequence[ModelChunk]) -> None:
        super().__init__(config=chunks[0].config)
        self._chunks = tuple(chunks)
        self.pg_collection = chunks[0].pg_collection
        self.pre_process = self.post_process = True
        self.share_embeddings_and_output_weights = chunks[-1].share_embeddings_and_output_weights
        for chunk in chunks:
            for name, child in chunk.named_children():
                self.add_module(name, child)

    def set_input_tensor(self, input_tensor: Any) -> None:
        """There is nothing in front of the whole model."""

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The weight that tied embeddings share."""
        return self._chunks[-1].shared_embedding_or_output_weight()

    def forward(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """One microbatch through all modules; the loss of every token or patch [B, S]."""
        *encoders, backbone = self._chunks
        present = [one for one in encoders if one.count_items(batch)]
        backbone.set_input_tensor([one(batch) for one in present])
        backbone.set_sources([one.place.module for one in present])
        losses: torch.Tensor = backbone(batch)
        return losses
