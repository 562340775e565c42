"""Job files (``pipeweaver.job/1``): what is trained, on what, on which batch; `docs/semu.md`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from megatron_pipeweaver.ir.batch import Item, MicrobatchMetadata
from megatron_pipeweaver.ir.cluster import ParallelSizes
from megatron_pipeweaver.ir.json_reader import JsonNode, parse_json, read_bytes
from megatron_pipeweaver.ir.lmm import (
    ExpertOptions,
    LatentOptions,
    LayerOptions,
    ModelSpec,
    Modulation,
    ModuleKind,
    ModuleSpec,
)
from megatron_pipeweaver.ir.strategy import LayerStrategy
from megatron_pipeweaver.partition.candidates import DEFAULT_CANDIDATES
from megatron_pipeweaver.partition.tune import Job
from megatron_pipeweaver.semu.devices import DeviceProfile, load_device, shipped_devices
from megatron_pipeweaver.semu.memory import OptimizerOptions
from megatron_pipeweaver.semu.model import DEFAULT_STRATEGIES
from megatron_pipeweaver.semu.options import Attention, RunOptions
from megatron_pipeweaver.semu.presets import module_preset, setup_preset

JOB_FORMAT = "pipeweaver.job/1"
_OPTIONAL = frozenset(
    {
        "setup",
        "model",
        "ranks",
        "parallel",
        "options",
        "optimizer",
        "strategies",
        "candidates",
        "sub_microbatch",
        "segments",
    }
)
_Kind = TypeVar("_Kind", bound=StrEnum)
Reader = Callable[[JsonNode], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFile:
    """A job, how it is run (`emulate`), and on how many ranks it is to be run (`tune`)."""

    job: Job
    parallel: ParallelSizes
    ranks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticBatch:
    """Microbatches with evenly distributed item counts: from `least` to `most` of `item`."""

    sequence_length: int
    module: str
    item: Item
    least: int
    most: int

    def draw(self, count: int, seed: int) -> tuple[MicrobatchMetadata, ...]:
        """`count` microbatches, the same for the same `seed`."""
        source = random.Random(seed)
        return tuple(
            MicrobatchMetadata(
                sequence_length=self.sequence_length,
                items={self.module: (self.item,) * source.randint(self.least, self.most)},
            )
            for _ in range(count)
        )


SYNTHETIC: Mapping[str, SyntheticBatch] = MappingProxyType(
    {
        # Images of 728 x 728 pixels: 52 x 52 patches of 14, 169 tokens (paper, section 7).
        "images": SyntheticBatch(
            sequence_length=8192,
            module="vision",
            item=Item(units=2704, tokens=169),
            least=0,
            most=48,
        ),
        # Clips packed into 8192 latent patches, one prompt of 256 tokens for each of them.
        "clips": SyntheticBatch(
            sequence_length=8192,
            module="text",
            item=Item(units=256, tokens=256),
            least=1,
            most=8,
        ),
    }
)


def load_job(path: Path) -> JobFile:
    """The job at `path`.

    Raises:
        ConfigError: it cannot be read or is no job file; names the place and the mend.
    """
    root = parse_json(read_bytes(path), str(path))
    found = root.get("format")
    if found is None:
        root.fail(f"key 'format' is missing; add it ({JOB_FORMAT!r})")
    if found.text() != JOB_FORMAT:
        found.fail(f"is {found.text()!r}; this reader takes {JOB_FORMAT!r}")
    root.keys(frozenset({"format", "device", "batch"}), _OPTIONAL)
    model, parallel = _model(root)
    options = _built(root, "options", RunOptions, _OPTION_READERS)
    job = Job(
        model=model,
        device=_device(root["device"], path.parent),
        microbatches=_batch(root["batch"], model),
        options=replace(options, parallel=parallel),
        optimizer=_built(root, "optimizer", OptimizerOptions, _OPTIMIZER_READERS),
        strategies=_strategies(root.get("strategies")),
        candidates=_candidates(root.get("candidates")),
        sub_microbatch=_by_module(root.get("sub_microbatch"), model.modules[:-1]),
        segments=_by_module(root.get("segments"), model.modules),
    )
    ranks = root.get("ranks")
    return JobFile(
        job=job,
        parallel=parallel,
        ranks=parallel.world_size if ranks is None else ranks.integer(minimum=1),
    )


def _model(root: JsonNode) -> tuple[ModelSpec, ParallelSizes]:
    """The model, and its parallel sizes: the file's, or else the setup's."""
    setup, model, given = root.get("setup"), root.get("model"), root.get("parallel")
    if (setup is None) == (model is None):
        root.fail("give either 'setup' or 'model'")
    parallel = None if given is None else _parallel(given)
    if setup is not None:
        preset = setup.build(setup_preset, setup.text())
        return preset.model, parallel or preset.parallel
    assert model is not None
    model.keys(frozenset({"name", "modules"}))
    modules = tuple(_module(one) for one in model["modules"].array())
    spec = model.build(ModelSpec, name=model["name"].text(), modules=modules)
    return spec, parallel or ParallelSizes(pipeline=1)


def _module(node: JsonNode) -> ModuleSpec:
    """A preset with changes, or a module of its own."""
    preset = node.get("preset")
    node.keys(frozenset(), frozenset({*_MODULE_READERS, "preset"}))
    if preset is None:
        node.keys(_MODULE_REQUIRED, frozenset(_MODULE_READERS))
        return node.build(ModuleSpec, **_fields(node, _MODULE_READERS))
    base = preset.build(module_preset, preset.text())
    return node.build(replace, base, **_fields(node, _MODULE_READERS))


def _parallel(node: JsonNode) -> ParallelSizes:
    """Sequence parallelism is on with tensor parallelism unless the file says otherwise."""
    node.keys(frozenset({"pipeline"}), frozenset(_PARALLEL_READERS))
    sizes = _fields(node, _PARALLEL_READERS)
    sizes.setdefault("sequence_parallel", sizes.get("tensor", 1) > 1)
    return node.build(ParallelSizes, **sizes)


def _device(node: JsonNode, folder: Path) -> DeviceProfile:
    """A shipped profile by name, or a file, its path relative to the job file's folder."""
    name = node.text()
    shipped = name.lower() in {one.lower() for one in shipped_devices()}
    return node.build(load_device, name if shipped else str(folder / name))


def _batch(node: JsonNode, model: ModelSpec) -> tuple[MicrobatchMetadata, ...]:
    found = _synthetic(node) if node.get("synthetic") is not None else _microbatches(node)
    encoders = [one.name for one in model.modules[:-1]]
    unknown = sorted({name for one in found for name in one.items} - set(encoders))
    if unknown:
        node.fail(f"has items of {unknown}; model {model.name!r} takes items of {encoders}")
    return found


def _synthetic(node: JsonNode) -> tuple[MicrobatchMetadata, ...]:
    node.keys(frozenset({"synthetic", "microbatches"}), frozenset({"seed"}))
    name = node["synthetic"]
    if name.text() not in SYNTHETIC:
        name.fail(f"is {name.text()!r}; it must be one of {list(SYNTHETIC)}")
    seed = node.get("seed")
    count = node["microbatches"].integer(minimum=1)
    if count > _MOST_MICROBATCHES:
        node["microbatches"].fail(f"is {count}; it must be at most {_MOST_MICROBATCHES}")
    return SYNTHETIC[name.text()].draw(count, 0 if seed is None else seed.integer())


def _microbatches(node: JsonNode) -> tuple[MicrobatchMetadata, ...]:
    node.keys(frozenset({"microbatches"}))
    found = tuple(_microbatch(one) for one in node["microbatches"].array())
    if not found:
        node["microbatches"].fail("holds no microbatch; give at least one")
    return found


def _microbatch(node: JsonNode) -> MicrobatchMetadata:
    node.keys(frozenset({"sequence_length"}), frozenset(_MICROBATCH_READERS))
    return node.build(MicrobatchMetadata, **_fields(node, _MICROBATCH_READERS))


def _items(node: JsonNode) -> dict[str, tuple[Item, ...]]:
    """Items by module: ``[units, tokens]``, or ``[units, tokens, how many]``, each."""
    return {
        name: tuple(item for entry in entries.array() for item in _repeated(entry))
        for name, entries in node.entries()
    }


def _repeated(node: JsonNode) -> tuple[Item, ...]:
    sizes = node.array()
    if len(sizes) not in {2, 3}:
        node.fail(f"has {len(sizes)} entries; write [units, tokens] or [units, tokens, count]")
    copies = sizes[2].integer() if len(sizes) == 3 else 1
    if copies > _MOST_ITEMS:
        sizes[2].fail(f"is {copies}; it must be at most {_MOST_ITEMS}")
    item = node.build(Item, units=sizes[0].integer(minimum=1), tokens=sizes[1].integer())
    return (item,) * copies


def _strategies(node: JsonNode | None) -> tuple[LayerStrategy, ...]:
    if node is None:
        return DEFAULT_STRATEGIES
    found = tuple(_one_of(LayerStrategy)(one) for one in node.array())
    if not found or len(set(found)) != len(found):
        node.fail("must name at least one strategy, and each once")
    return found


def _candidates(node: JsonNode | None) -> int:
    return DEFAULT_CANDIDATES if node is None else node.integer(minimum=2)


def _by_module(node: JsonNode | None, modules: tuple[ModuleSpec, ...]) -> dict[str, int]:
    if node is None:
        return {}
    names = [one.name for one in modules]
    found = {name: size.integer(minimum=1) for name, size in node.entries()}
    if unknown := sorted(set(found) - set(names)):
        node.fail(f"names {unknown}; it takes {names}")
    return found


def _fields(node: JsonNode, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """What `node` has of the keys of `readers`, read."""
    return {key: readers[key](value) for key, value in node.entries() if key in readers}


def _built(
    root: JsonNode, key: str, make: Callable[..., Any], readers: Mapping[str, Reader]
) -> Any:
    """What `make` makes of the optional object under `key`, all of whose keys are optional."""
    node = root.get(key)
    if node is None:
        return make()
    node.keys(frozenset(), frozenset(readers))
    return node.build(make, **_fields(node, readers))


def _object_of(make: Callable[..., Any], readers: Mapping[str, Reader], *required: str) -> Reader:
    def read(node: JsonNode) -> Any:
        node.keys(frozenset(required), frozenset(readers))
        return node.build(make, **_fields(node, readers))

    return read


def _one_of(kind: type[_Kind]) -> Callable[[JsonNode], _Kind]:
    def read(node: JsonNode) -> _Kind:
        values = [one.value for one in kind]
        if node.text() not in values:
            node.fail(f"is {node.text()!r}; it must be one of {values}")
        return kind(node.text())

    return read


def _positive(node: JsonNode) -> int:
    return node.integer(minimum=1)


def _integers(node: JsonNode) -> tuple[int, ...]:
    return tuple(one.integer() for one in node.array())


def _positives(node: JsonNode) -> tuple[int, ...]:
    return tuple(one.integer(minimum=1) for one in node.array())


def _texts(node: JsonNode) -> tuple[str, ...]:
    return tuple(one.text() for one in node.array())


_MOST_MICROBATCHES = 100_000
_MOST_ITEMS = 100_000

_EXPERT_READERS: Mapping[str, Reader] = {
    "count": _positive,
    "active": _positive,
    "ffn_hidden_size": _positive,
    "shared_ffn_hidden_size": _positive,
    "dense_layers": JsonNode.integer,
    "only_layers": _integers,
}
_LATENT_READERS: Mapping[str, Reader] = {
    "kv_rank": _positive,
    "query_rank": _positive,
    "head_size": _positive,
    "rotary_size": _positive,
    "value_size": _positive,
}
_LAYER_READERS: Mapping[str, Reader] = {
    "head_size": _positive,
    "rms_norm": JsonNode.boolean,
    "bias": JsonNode.boolean,
    "qkv_bias": JsonNode.boolean,
    "rotary": JsonNode.boolean,
    "qk_norm": JsonNode.boolean,
    "window": _positive,
    "full_attention_layers": _integers,
    "latent": _object_of(
        LatentOptions, _LATENT_READERS, "kv_rank", "head_size", "rotary_size", "value_size"
    ),
    "experts": _object_of(ExpertOptions, _EXPERT_READERS, "count", "active", "ffn_hidden_size"),
    "context_size": _positive,
    "cross_attention_layers": _integers,
    "cross_attention_alone": JsonNode.boolean,
    "modulation": _one_of(Modulation),
    "tap_layers": _integers,
    "positions": JsonNode.integer,
}
_MODULE_READERS: Mapping[str, Reader] = {
    "name": JsonNode.text,
    "kind": _one_of(ModuleKind),
    "layers": _positive,
    "hidden_size": _positive,
    "ffn_hidden_size": _positive,
    "attention_heads": _positive,
    "kv_groups": _positive,
    "after": _texts,
    "frozen": JsonNode.boolean,
    "gated_mlp": JsonNode.boolean,
    "vocab_size": _positive,
    "tied_embeddings": JsonNode.boolean,
    "input_size": _positive,
    "output_size": _positive,
    "projector_hidden_size": _positive,
    "patch_size": _positive,
    "image_channels": _positive,
    "patches_per_token": _positive,
    "layer": _object_of(LayerOptions, _LAYER_READERS),
}
_MODULE_REQUIRED = frozenset(
    {
        "name",
        "kind",
        "layers",
        "hidden_size",
        "ffn_hidden_size",
        "attention_heads",
        "kv_groups",
    }
)
_PARALLEL_READERS: Mapping[str, Reader] = {
    "pipeline": _positive,
    "tensor": _positive,
    "data": _positive,
    "context": _positive,
    "expert": _positive,
    "sequence_parallel": JsonNode.boolean,
}
_OPTION_READERS: Mapping[str, Reader] = {
    "attention": _one_of(Attention),
    "element_bytes": _positive,
    "gradient_bytes": _positive,
    "fused_norm": JsonNode.boolean,
    "fused_activation": JsonNode.boolean,
    "fused_rotary": JsonNode.boolean,
    "fused_linear": JsonNode.boolean,
    "dropout": JsonNode.boolean,
    "mask_bytes": _positive,
}
_OPTIMIZER_READERS: Mapping[str, Reader] = {
    "state_bytes": JsonNode.integer,
    "distributed": JsonNode.boolean,
    "overlap_grad_reduce": JsonNode.boolean,
    "overlap_param_gather": JsonNode.boolean,
}
_MICROBATCH_READERS: Mapping[str, Reader] = {
    "sequence_length": _positive,
    "samples": _positive,
    "items": _items,
    "document_lengths": _positives,
}
