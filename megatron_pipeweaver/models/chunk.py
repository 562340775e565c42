"""A model chunk: what one pipeline rank holds of one modality module.

Tensor shapes: S sequence, B batch (images, for encoders), H hidden width; C, Y, X image channels,
height and width; V vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.layout import ChunkPlace
from megatron_pipeweaver.ir.lmm import ModelSpec, ModuleSpec
from megatron_pipeweaver.ir.plan import PlanPass
from megatron_pipeweaver.ir.strategy import layer_strategies
from megatron_pipeweaver.models.options import ModelOptions
from megatron_pipeweaver.models.strategy import Saver, StrategyLayer, check_strategies
from megatron_pipeweaver.models.weight_grad import WeightGradients


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkSetting:
    """All that a chunk is made from.

    `root` is the config that all chunks of a rank share, `config` that of the chunk's own layers;
    `groups` is Megatron's process group collection.
    """

    model: ModelSpec
    module: ModuleSpec
    place: ChunkPlace
    root: Any
    config: Any
    options: ModelOptions
    groups: Any


class ModelChunk(MegatronModule, abc.ABC):  # type: ignore[misc]
    """One chunk, with the face that Megatron's wrappers, schedules and optimizers look for.

    Attributes:
        place: where the chunk stands in its module and on its rank.
        vp_stage: its index among the rank's chunks; ``get_model`` sets it to the same again.
        pre_process: whether it is the first chunk of the whole pipeline.
        post_process: whether it is the last chunk of the whole pipeline.
        embeds_tokens: whether it holds the token embedding.
        share_embeddings_and_output_weights: whether the backbone's embeddings are tied.
        pg_collection: Megatron's process groups.
        model_type: Megatron's.
    """

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(config=setting.root)
        place = setting.place
        self.place = place
        self.module_spec = setting.module
        self.vp_stage = place.virtual_stage
        self.pre_process = place.is_first and setting.module is setting.model.modules[0]
        self.post_process = place.is_last and setting.module is setting.model.backbone
        self.embeds_tokens = False
        self.share_embeddings_and_output_weights = setting.model.backbone.tied_embeddings
        self.pg_collection = setting.groups
        self.model_type = ModelType.encoder_or_decoder
        self._inputs: tuple[Tensor, ...] = ()
        self._items: slice = slice(None)
        self._sources: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def layers(self) -> Sequence[StrategyLayer]:
        """The chunk's transformer layers, in order."""

    @abc.abstractmethod
    def run(self, batch: Mapping[str, Any], inputs: tuple[Tensor, ...], items: slice) -> Tensor:
        """The chunk's forward.

        Args:
            batch: one microbatch's tensors.
            inputs: what the producers of this pass made, in order.
            items: which of the module's items the pass works on.
        """

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that tied embeddings share, on the two chunks that hold it."""
        return None

    def set_input_tensor(self, input_tensor: Sequence[Tensor | None] | Tensor | None) -> None:
        """What the next forward takes from the producers of its pass, in their order."""
        tensors = [input_tensor] if isinstance(input_tensor, Tensor) else (input_tensor or [])
        self._inputs = tuple(one for one in tensors if one is not None)

    def set_pass(self, one: PlanPass) -> None:
        """Which pass the next forward runs; without a call, it runs all items in one."""
        if one.key.module != self.place.module:
            raise ConfigError(
                f"chunk {self.place.module}{self.place.stage}: pass {one.key} is of another module"
            )
        self._items = slice(one.payload.item_start, one.payload.item_stop)
        self.set_sources([key.module for key in one.after])

    def set_sources(self, modules: Sequence[str]) -> None:
        """Which modules the next forward's inputs come from; only several encoders need it."""
        self._sources = tuple(modules)

    def inputs_of(self, module: str, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Those of `inputs` that `module` made, in order.

        Raises:
            ConfigError: several modules may have made them, and nobody said which did.
        """
        after, sources = self.module_spec.after, self._sources
        if not sources and len(after) == 1:
            sources = after * len(inputs)
        if len(sources) != len(inputs):
            raise ConfigError(
                f"chunk {self.place.module}{self.place.stage}: got {len(inputs)} inputs from "
                f"{len(sources)} known modules of {list(after)}; name them with set_sources"
            )
        return tuple(one for one, name in zip(inputs, sources, strict=True) if name == module)

    def count_items(self, batch: Mapping[str, Any]) -> int:
        """How many items of its module a microbatch has; the backbone has none."""
        del batch
        return 0

    def set_strategy(self, name: str, saver: Saver | None = None) -> None:
        """Under which memory strategy the next forwards run.

        Args:
            name: as in `ir.strategy`, one strategy for all layers or runs of them.
            saver: where layers that are offloaded keep what they save.

        Raises:
            ConfigError: there is no such strategy, or it is not one of this chunk's layers.
        """
        strategies = layer_strategies(name, len(self.layers))
        check_strategies(strategies, self.layers)
        for strategy, layer in zip(strategies, self.layers, strict=True):
            layer.strategy, layer.saver = strategy, saver

    @cached_property
    def weight_gradients(self) -> WeightGradients:
        """Lets the chunk's linears leave weight gradients out of their backwards."""
        made = WeightGradients(self)
        for layer in self.layers:
            layer.weight_gradients = made
        return made

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Run one stage of one pass, on the inputs and the pass that were set.

        Args:
            batch: one microbatch's tensors, whichever of ``images`` [items, C, Y, X], ``tokens``,
                ``labels``, ``position_ids``, ``loss_mask`` [B, S], ``attention_mask`` and, where
                documents are packed into one sample, their borders ``cu_seqlens`` the chunk's
                module reads.

        Returns:
            The hidden states [S, B, H], never a view; of the backbone's last chunk the loss of
            every token [B, S], or logits [B, S, V] where there are no labels.
        """
        inputs, self._inputs = self._inputs, ()
        items, self._items = self._items, slice(None)
        output = self.run(batch, inputs, items)
        self._sources = ()
        viewless: Tensor = make_viewless_tensor(
            output, requires_grad=output.requires_grad, keep_graph=True
        )
        return viewless

    def only_input(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The one tensor that the stage in front hands over."""
        if len(inputs) != 1:
            raise ConfigError(
                f"chunk {self.place.module}{self.place.stage}: got {len(inputs)} input tensors; "
                "set the output of the stage in front with set_input_tensor"
            )
        return inputs[0]


class NamedChunk(ModelChunk):
    """A chunk whose parameters are called by its module: ``<module>_model.``, with a decoder."""

    def __init__(self, setting: ChunkSetting) -> None:
        super().__init__(setting)
        self._model_name = f"{setting.module.name}_model"

    @property
    def layers(self) -> Sequence[StrategyLayer]:
        """The chunk's transformer layers."""
        layers: Sequence[StrategyLayer] = self.model.decoder.layers
        return layers

    @property
    def model(self) -> Any:
        """The chunk's part of the module."""
        return getattr(self, self._model_name)

    def hold(self, model: Any) -> None:
        """Take `model` in, under the name that it has in the whole model."""
        self.add_module(self._model_name, model)


def run_block(block: Any, hidden_SBH: Tensor, **known: Any) -> Tensor:
    """A transformer block that does not embed, on the output of the one in front of it.

    `known` is what its layers are told beside, by Megatron's names.
    """
    block.set_input_tensor(hidden_SBH)
    output: Tensor = block(hidden_states=None, **{"attention_mask": None, **known})
    block.input_tensor = None
    return output
