"""Chunks of a language model that encodes prompts: no vocabulary head, its last norm is its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.chunk import ChunkSetting, NamedChunk
from megatron_pipeweaver.models.packing import (
    causal_block_mask,
    packed_sequences,
    positions_within,
)
from megatron_pipeweaver.models.projector import build_projector
from megatron_pipeweaver.models.specs import language_layer_spec, uses_transformer_engine


@final
class TextChunk(NamedChunk):
    """Some layers of a GPT over prompts: the token embedding in front, or the last norm behind.

    Its items are the microbatch's ``prompts``, one tensor of token ids each. Prompts of one length
    stand side by side, others one behind the other in one row, as the plan has them.

    Parameters are named ``<module>_model.`` as those of Megatron's GPT, and
    ``<module>_projection.`` where the module has an `output_size`.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(setting)
        module, place, options = setting.module, setting.place, setting.options
        if module.vocab_size is None:
            raise ConfigError(f"module {module.name!r}: a text encoder needs a vocab_size")
        if setting.config.sequence_parallel:
            raise ConfigError(
                f"module {module.name!r}: text encoders run without sequence parallelism; "
                f"set sequence_parallel to False in overrides[{module.name!r}]"
            )
        self._projection_name = f"{module.name}_projection"
        self._fused = uses_transformer_engine(options)
        self._rotary = options.position_embedding == "rope"
        self.hold(_build_model(setting))
        if place.is_last and module.output_size is not None:
            projector = build_projector(module, options, setting.groups)
            self.add_module(self._projection_name, projector)

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """The microbatch's prompts."""
        return len(batch.get("prompts", ()))

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Prompts, or hidden states, to hidden states [S, B, H]."""
        prompts: Sequence[Tensor] = batch.get("prompts", ())[items]
        if not prompts:
            raise ConfigError(
                f"chunk {self.place.module}{self.place.stage}: the microbatch has no 'prompts'; "
                "a microbatch without prompts has no text pass"
            )
        lengths = tuple(len(one) for one in prompts)
        side_by_side = len(set(lengths)) == 1
        model = self.model
        if self.place.is_first:
            hidden_SBH = _embed(model.embedding, prompts, lengths, side_by_side)
        else:
            hidden_SBH = self.only_input(inputs)
        device = hidden_SBH.device
        # A fused kernel turns every sequence from its start; a row's angles only matter by their
        # differences, within the sequences that attention stays in.
        model.decoder.set_input_tensor(hidden_SBH)
        output: Tensor = model.decoder(
            hidden_states=None,
            attention_mask=(
                None if side_by_side or self._fused else causal_block_mask(lengths, device)
            ),
            rotary_pos_emb=model.rotary_pos_emb(len(hidden_SBH)) if self._rotary else None,
            packed_seq_params=(
                packed_sequences(lengths, device) if self._fused and not side_by_side else None
            ),
        )
        model.decoder.input_tensor = None
        projector = getattr(self, self._projection_name, None)
        return output if projector is None else projector(output)


def _embed(
    embedding: Any, prompts: Sequence[Tensor], lengths: Sequence[int], side_by_side: bool
) -> Tensor:
    """The prompts' embeddings [S, B, H]: one prompt per column, or all in one."""
    rows = len(prompts) if side_by_side else 1
    tokens_BS = torch.cat(tuple(prompts)).view(rows, -1)
    positions_BS = positions_within(lengths, tokens_BS.device).view(rows, -1)
    embedded_SBH: Tensor = embedding(input_ids=tokens_BS, position_ids=positions_BS)
    return embedded_SBH


def _build_model(setting: ChunkSetting) -> Any:
    """The chunk's part of a GPT without output layer, under the names that GPT gives it."""
    module, place, options = setting.module, setting.place, setting.options
    config = setting.config
    model = MegatronModule(config=config)
    if place.is_first:
        model.embedding = LanguageModelEmbedding(
            config=config,
            vocab_size=module.vocab_size,
            max_sequence_length=options.max_sequence_length,
            position_embedding_type=options.position_embedding,
            scatter_to_sequence_parallel=False,
            tp_group=setting.groups.tp,
        )
    if options.position_embedding == "rope":
        model.rotary_pos_emb = RotaryEmbedding(
            kv_channels=config.kv_channels,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=setting.groups.cp,
            **options.rotary,
        )
    model.decoder = TransformerBlock(
        config,
        language_layer_spec(options),
        pre_process=False,
        post_process=place.is_last,
        pg_collection=setting.groups,
        vp_stage=place.segment,
    )
    return model
