"""Chunks of the language model; the first one puts image embeddings in their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.chunk import ChunkSetting, NamedChunk
from megatron_pipeweaver.models.context_parallel import SequenceShare
from megatron_pipeweaver.models.specs import language_block_spec, uses_transformer_engine


@final
class LanguageChunk(NamedChunk):
    """Some layers of a GPT: with the token embedding in front, or the output layer behind.

    With context parallelism every rank is given whole batches and hands out whole losses; between
    them, hidden states are those of its tokens (`SequenceShare`).

    Parameters are named ``<module>_model.``, as in Megatron's LLaVA model.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(setting)
        module, place, options = setting.module, setting.place, setting.options
        if module.vocab_size is None:
            raise ConfigError(f"module {module.name!r}: a language model needs a vocab_size")
        if options.position_embedding == "rope" and setting.config.kv_channels % 2:
            raise ConfigError(
                f"module {module.name!r}: heads are {setting.config.kv_channels} wide, and rotary "
                "position embeddings turn pairs; choose attention_heads for an even width"
            )
        if module.layer.latent is not None:
            _check_latent(setting)
        # Without encoders there is nothing to place, and an image token is a mistake.
        self._token_ids = {
            name: options.encoder(name).token_id for name in module.after or (module.name,)
        }
        if len(set(self._token_ids.values())) < len(self._token_ids):
            raise ConfigError(
                f"module {module.name!r}: encoders share token ids, {self._token_ids}; give each "
                "an id of its own in the model options' encoders"
            )
        self._position_axes = 3 if options.position_embedding == "mrope" else 1
        self._transformer_engine = uses_transformer_engine(options)
        self._sequence_parallel = setting.config.sequence_parallel
        self._share = _share_of(setting)
        self.embeds_tokens = place.is_first
        model = GPTModel(
            setting.config,
            language_block_spec(module, place, setting.config, options),
            vocab_size=module.vocab_size,
            max_sequence_length=options.max_sequence_length,
            pre_process=place.is_first,
            post_process=place.is_last,
            # Gathered logits are modified in place behind a view, which autograd refuses.
            parallel_output=True,
            share_embeddings_and_output_weights=module.tied_embeddings,
            position_embedding_type=options.position_embedding,
            **options.rotary,
            # Images are placed in whole sequences; they are scattered afterwards.
            scatter_embedding_sequence_parallel=False,
            pg_collection=setting.groups,
            vp_stage=place.segment,
        )
        self.hold(model)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The embedding on the first chunk, the output layer's weight on the last, else `None`."""
        weight: Tensor | None = self.model.shared_embedding_or_output_weight()
        return weight

    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """Tokens and image embeddings, or hidden states, to hidden states, losses or logits."""
        del items  # the backbone works on every sample
        model = self.model
        tokens_BS: Tensor = batch["tokens"]
        position_ids_BS = _positions(batch, tokens_BS, self._position_axes)
        embedded_SBH = None
        if self.place.is_first:
            embedded_SBH = self._embed(tokens_BS, position_ids_BS, inputs)
        else:
            model.decoder.set_input_tensor(self.only_input(inputs))
        mask, packed = self._documents(batch)
        output: Tensor = model(
            input_ids=tokens_BS,
            position_ids=position_ids_BS,
            attention_mask=mask,
            packed_seq_params=packed,
            decoder_input=embedded_SBH,
            labels=self._own(batch.get("labels")) if self.place.is_last else None,
            loss_mask=self._own(batch.get("loss_mask")),
        )
        model.decoder.input_tensor = None
        if self._share is not None and self.place.is_last:
            output = self._share.gather(output, dim=1)
        return output

    def _own(self, whole_BS: Tensor | None) -> Tensor | None:
        """What belongs to this rank's tokens."""
        if self._share is None or whole_BS is None:
            return whole_BS
        return self._share.take(whole_BS, dim=1)

    def _documents(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, Any]:
        """What keeps packed documents apart: a mask, or for Transformer Engine, where they end."""
        ends_D: Tensor | None = batch.get("cu_seqlens")
        if ends_D is None or not self._transformer_engine:
            if ends_D is not None and self.config.window_size is not None:
                raise ConfigError(
                    "packed documents with --window-size and --transformer-impl local: Megatron's "
                    "own attention takes a window for all of its mask, so documents would see each "
                    "other; leave one of the three out"
                )
            mask = batch.get("attention_mask") if ends_D is None else document_mask(ends_D)
            if self._share is not None and mask is not None:
                mask = self._share.take(mask, dim=2)
            return mask, None
        if self._share is not None:
            raise ConfigError(
                "packed documents with context parallelism and Transformer Engine: each document "
                "would have to be dealt apart; give --transformer-impl local, or pack none"
            )
        longest = int(ends_D.diff().max())
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends_D,
            cu_seqlens_kv=ends_D,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return None, packed

    def _embed(
        self, tokens_BS: Tensor, position_ids_BS: Tensor, images: tuple[Tensor, ...]
    ) -> Tensor:
        """Token embeddings with image embeddings in their positions, [S, B, H]."""
        places = {name: tokens_BS == one for name, one in self._token_ids.items()}
        text_BS = tokens_BS
        for is_image_BS in places.values():
            # An image token need not be in the vocabulary; what stands for it is replaced below.
            text_BS = text_BS.masked_fill(is_image_BS, 0)
        embedded_SBH: Tensor = self.model.embedding(input_ids=text_BS, position_ids=position_ids_BS)
        for name, is_image_BS in places.items():
            made = self.inputs_of(name, images)
            embedded_SBH = place_image_embeddings(embedded_SBH, is_image_BS, made)
        if self._share is not None:
            embedded_SBH = self._share.take(embedded_SBH, dim=0)
        if self._sequence_parallel:
            embedded_SBH = tensor_parallel.scatter_to_sequence_parallel_region(embedded_SBH)
        return embedded_SBH


def _check_latent(setting: ChunkSetting) -> None:
    """Refuse what latent attention cannot do in chunks, by name."""
    module, options, config = setting.module, setting.options, setting.config
    alone = not uses_transformer_engine(options)
    refused = {
        f"position_embedding {options.position_embedding!r}": (
            options.position_embedding != "rope",
            "it turns its own channels by their positions; choose 'rope'",
        ),
        f"tensor_model_parallel_size {config.tensor_model_parallel_size}": (
            config.tensor_model_parallel_size > 1 and not config.sequence_parallel,
            "Megatron would sum up gradients of latents' norms that every rank has in full; set "
            "sequence_parallel",
        ),
        f"context_parallel_size {config.context_parallel_size} and no Transformer Engine": (
            alone and config.context_parallel_size > 1,
            "keys that heads share are not gathered; leave one of them out",
        ),
    }
    for what, (wrong, why) in refused.items():
        if wrong:
            raise ConfigError(f"module {module.name!r}: latent attention with {what}: {why}")


def _share_of(setting: ChunkSetting) -> SequenceShare | None:
    """This rank's tokens, `None` for all of them."""
    size, group = setting.config.context_parallel_size, setting.groups.cp
    if size != group.size():
        raise ConfigError(
            f"module {setting.module.name!r}: context_parallel_size is {size}, and the job has "
            f"{group.size()} context-parallel ranks; give the option that size"
        )
    return SequenceShare(group) if size > 1 else None


def document_mask(cu_seqlens: Tensor) -> Tensor:
    """What must not be attended to among documents that are packed into one sequence.

    Args:
        cu_seqlens: the documents' borders, from 0 to the sequence's length.

    Returns:
        ``[1, 1, S, S]``, true where a token (a row) would look at a later one, or at one of
        another document.
    """
    positions_S = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)
    document_S = torch.bucketize(positions_S, cu_seqlens, right=True)
    apart_SS = document_S[:, None] != document_S
    return (apart_SS | (positions_S[:, None] < positions_S))[None, None]


def place_image_embeddings(
    embedded_SBH: Tensor, is_image_BS: Tensor, images: Sequence[Tensor]
) -> Tensor:
    """`embedded_SBH` with image embeddings wherever `is_image_BS` is true.

    Args:
        embedded_SBH: the embeddings of all tokens.
        is_image_BS: the positions that take image embeddings, filled sample by sample.
        images: the encoder's outputs, one [tokens, images, H] per pass, in the order of the
            microbatch's images; placed image by image, token by token.

    Raises:
        ConfigError: the images do not make as many embeddings as there are positions.
    """
    positions = is_image_BS.flatten().nonzero().squeeze(1)
    count = sum(one.shape[0] * one.shape[1] for one in images)
    if count != len(positions):
        raise ConfigError(
            f"image embeddings: {len(images)} passes make {count} of them and the tokens have "
            f"{len(positions)} image positions; repeat the image token once per embedding"
        )
    if not images:
        return embedded_SBH
    size_S, size_B, size_H = embedded_SBH.shape
    features = torch.cat([one.transpose(0, 1).reshape(-1, size_H) for one in images])
    flat = embedded_SBH.transpose(0, 1).reshape(size_B * size_S, size_H)
    placed = flat.index_put((positions,), features.to(flat.dtype))
    return placed.view(size_B, size_S, size_H).transpose(0, 1).contiguous()


def _positions(batch: Mapping[str, Any], tokens_BS: Tensor, axes: int) -> Tensor:
    """``[B, S]``, or ``[axes, B, S]`` where there are several: time, row and column (M-RoPE)."""
    given: Tensor | None = batch.get("position_ids")
    if given is None:
        given = _in_order(tokens_BS)
    return given.expand(axes, *tokens_BS.shape) if axes > 1 else given


def _in_order(tokens_BS: Tensor) -> Tensor:
    return torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
