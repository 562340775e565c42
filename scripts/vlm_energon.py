"""Data for `pretrain_vlm.py --energon PATH`: images among text from a WebDataset, packed.

A sample of the data set (``.nv-meta/dataset.yaml`` says `CrudeWebdataset`) holds images, of any
size, and says in ``json`` in which order they stand among text:

    000001.first.jpg  000001.second.png  000001.json
    [{"image": "first.jpg"}, {"text": "A cup of coffee."}, {"image": "second.png"}, ...]

or has one ``txt``, a caption that stands behind all its images. Samples are packed whole into
sequences of one length, and attend to themselves alone.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.energon import (
    Cooker,
    Sample,
    SavableDataLoader,
    SkipSample,
    TaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from torch import Tensor
from torch.nn.functional import interpolate

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.positions import positions_in_space
from megatron_pipeweaver.plugin.energon import EnergonStream, read_state
from megatron_pipeweaver.plugin.vision_language import VisionLanguage

Tokenize = Callable[[str], Sequence[int]]

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP normalises its images by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingOptions:
    """What sequences look like; sizes in pixels and tokens.

    A token stands for a square of `pixels_per_token` by as many. Images become of `image_size`,
    height and width, or, if `dynamic`, keep their shape and have at most as many pixels. A
    position has `position_axes` coordinates. `separator` ends every sample. `buffer` samples are
    looked through for those that fill a sequence.
    """

    sequence_length: int
    image_size: tuple[int, int]
    pixels_per_token: int
    image_token: int
    separator: int
    tokenize: Tokenize
    dynamic: bool = False
    position_axes: int = 1
    buffer: int = 64

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """What an image of so many pixels is resized to."""
        if not self.dynamic:
            return self.image_size
        return fitted_size(height, width, self.pixels_per_token, math.prod(self.image_size))

    def grid(self, image_CYX: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens that stand for a resized image."""
        _, height, width = image_CYX.shape
        return height // self.pixels_per_token, width // self.pixels_per_token


def byte_tokens(vocabulary: int) -> Tokenize:
    """Text as its UTF-8 bytes, for want of a tokenizer.

    Raises:
        ConfigError: the vocabulary has no room for bytes.
    """
    if vocabulary < 256:
        raise ConfigError(
            f"--vocab-size {vocabulary}: without a tokenizer text is read byte by byte, which "
            "takes 256 tokens; give more, or a --tokenizer-type"
        )
    return lambda text: list(text.encode())


@edataclass
class MixedSample(Sample):
    """Images and text in their order."""

    parts: list[Tensor | str]


@edataclass
class Document(Sample):
    """A sample in tokens: `tokens` [n], their `positions` [n] or [3, n], images [3, Y, X] each."""

    tokens: Tensor
    positions: Tensor
    images: list[Tensor]


@edataclass
class PackedSample(Sample):
    """Documents that share a sequence."""

    documents: list[Document]


@stateless
def cook(sample: dict[str, Any]) -> MixedSample:
    """A sample of the data set with its parts in order; a part that is missing skips it."""
    images = {
        name: value
        for name, value in sample.items()
        if name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
    }
    if "json" in sample:
        told = sample["json"]
        told = json.loads(told) if isinstance(told, (bytes, str)) else told
        missing = [one["image"] for one in told if "image" in one and one["image"] not in images]
        if missing:
            raise SkipSample(f"{sample['__key__']}: has no {missing}")
        parts = [images[one["image"]] if "image" in one else one["text"] for one in told]
    else:
        parts = [images[name] for name in sorted(images)] + [sample.get("txt", "")]
    return MixedSample(**basic_sample_keys(sample), parts=parts)


class PackingEncoder(TaskEncoder[Any, Any, Any, Any]):
    """From samples of the data set to microbatches of `pretrain_vlm.py`.

    Args:
        options: what sequences look like.
    """

    cookers = (Cooker(cook),)

    def __init__(self, options: PackingOptions) -> None:
        self._options = options

    @stateless
    def encode_sample(self, sample: MixedSample) -> Document:
        """Tokens, and resized images; what is longer than a sequence is skipped."""
        options = self._options
        tokens: list[int] = []
        images = []
        for part in sample.parts:
            if isinstance(part, str):
                tokens += options.tokenize(part)
            else:
                images.append(fit_image(part, options.size_of(*part.shape[-2:])))
                tokens += [options.image_token] * math.prod(options.grid(images[-1]))
        tokens.append(options.separator)
        if len(tokens) > options.sequence_length:
            raise SkipSample(f"{sample.__key__}: has {len(tokens)} tokens")
        positions = torch.arange(len(tokens))
        if options.position_axes > 1:
            grids = [options.grid(one) for one in images]
            positions = positions_in_space(torch.tensor(tokens), options.image_token, grids)
        return Document.derive_from(
            sample, tokens=torch.tensor(tokens), positions=positions, images=images
        )

    def select_samples_to_pack(self, samples: list[Document]) -> list[list[Document]]:
        """Sequences that the samples fill: longest first, each where it fits first."""
        return pack(samples, self._options.sequence_length)

    @stateless
    def pack_selected_samples(self, samples: list[Document]) -> PackedSample:
        """The documents of one sequence."""
        return PackedSample.derive_from(samples[0], documents=list(samples))

    @stateless
    def batch(self, samples: list[PackedSample]) -> dict[str, Any]:
        """One sequence as a microbatch."""
        (sample,) = samples
        return packed_microbatch(sample.documents, self._options)


def pack(documents: Sequence[Document], length: int) -> list[list[Document]]:
    """`documents` in sequences of at most `length` tokens (first fit, longest first)."""
    sequences: list[list[Document]] = []
    room: list[int] = []
    for document in sorted(documents, key=lambda one: len(one.tokens), reverse=True):
        size = len(document.tokens)
        place = next((index for index, left in enumerate(room) if left >= size), None)
        if place is None:
            place = len(room)
            sequences.append([])
            room.append(length)
        sequences[place].append(document)
        room[place] -= size
    return sequences


def packed_microbatch(documents: Sequence[Document], options: PackingOptions) -> dict[str, Any]:
    """Documents one behind the other, filled up to a sequence's length.

    Returns:
        ``images`` [n, 3, Y, X], or a tuple of [3, Y, X] where sizes are dynamic; ``tokens``,
        ``labels``, ``loss_mask`` [1, length]; ``position_ids`` the same or [3, 1, length];
        ``cu_seqlens`` int32, the borders of the documents and of what fills up. No token predicts
        an image, the next document, or what fills up.
    """
    sizes = [len(one.tokens) for one in documents]
    rest = options.sequence_length - sum(sizes)
    sizes += [rest] if rest else []
    filling = torch.full((rest,), options.separator)
    tokens = torch.cat([*(one.tokens for one in documents), filling])
    in_order = torch.arange(rest)
    positions = torch.cat(
        [*(one.positions for one in documents), in_order.expand(*_axes(options), rest)], -1
    )
    ends = torch.tensor([0, *sizes]).cumsum(0)
    labels = torch.cat([tokens[1:], tokens[:1]])
    predicts = labels != options.image_token
    predicts[ends[1:] - 1] = False
    predicts[options.sequence_length - rest :] = False
    images = [image for one in documents for image in one.images]
    return {
        "images": tuple(images) if options.dynamic else _stacked(images, options.image_size),
        "tokens": tokens[None],
        "labels": labels.masked_fill(~predicts, 0)[None],
        "loss_mask": predicts.float()[None],
        "position_ids": positions.unsqueeze(-2),
        "cu_seqlens": ends.int(),
    }


def _axes(options: PackingOptions) -> tuple[int, ...]:
    return (options.position_axes,) if options.position_axes > 1 else ()


def _stacked(images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    return torch.stack(list(images)) if images else torch.zeros(0, 3, *size)


def fitted_size(height: int, width: int, side: int, most_pixels: int) -> tuple[int, int]:
    """Multiples of `side` close to an image's shape that have at most `most_pixels` pixels.

    `most_pixels` is at least ``side**2``.
    """
    scale = min(1.0, math.sqrt(most_pixels / (height * width)))
    rows, columns = (max(1, round(scale * one / side)) for one in (height, width))
    most = most_pixels // side**2
    if rows * columns > most:
        longer, shorter = max(rows, columns), min(rows, columns, math.isqrt(most))
        longer = min(longer, most // shorter)
        rows, columns = (longer, shorter) if rows >= columns else (shorter, longer)
    return rows * side, columns * side


def fit_image(image_CYX: Tensor, size: tuple[int, int]) -> Tensor:
    """An image of any size, with values from 0 to 1, as the model takes it: [3, *size]."""
    colours = image_CYX.expand(3, -1, -1) if len(image_CYX) == 1 else image_CYX[:3]
    fitted = interpolate(
        colours[None].float(), size, mode="bilinear", antialias=True, align_corners=False
    )[0]
    mean, deviation = (torch.tensor(one)[:, None, None] for one in (_MEAN, _DEVIATION))
    return (fitted - mean) / deviation


def make_loader(
    path: str, options: PackingOptions, workers: WorkerConfig, split: str
) -> SavableDataLoader[dict[str, Any]]:
    """Microbatches of a split of the data set, one packed sequence each.

    Args:
        path: the data set's folder, or a metadata set's file.
        options: what sequences look like.
        workers: which replica reads, and with how many processes.
        split: ``train`` is shuffled and repeated; others are read in order, over and over.
    """
    common: dict[str, Any] = {
        "split_part": split,
        "worker_config": workers,
        "batch_size": 1,
        "packing_buffer_size": options.buffer,
        "task_encoder": PackingEncoder(options),
    }
    if split == "train":
        dataset: Any = get_train_dataset(
            path, shuffle_buffer_size=options.buffer, max_samples_per_sequence=100, **common
        )
    else:
        dataset = get_val_dataset(path, **common)
    # In this process, Megatron collects garbage when it is told to (--manual-gc).
    every: dict[str, Any] = {} if workers.num_workers else {"gc_collect_every_n_steps": 0}
    return get_savable_loader(dataset, **every)


def energon_streams(args: argparse.Namespace, family: VisionLanguage) -> list[EnergonStream]:
    """What ``--energon`` trains on, validates on and tests on, from where training was left.

    Args:
        args: Megatron's.
        family: what the model is.

    Raises:
        ConfigError: the arguments do not fit packed data, or there is no state to go on from.
    """
    if args.micro_batch_size > 1:
        raise ConfigError(
            f"--micro-batch-size {args.micro_batch_size} with --energon: samples are packed into "
            "one sequence per microbatch; give --micro-batch-size 1"
        )
    replica = parallel_state.get_data_parallel_rank()
    replicas = parallel_state.get_data_parallel_world_size()
    workers = WorkerConfig(
        # Ranks of one replica read the same data.
        rank=replica,
        world_size=replicas,
        num_workers=args.num_workers,
        data_parallel_group=parallel_state.get_data_parallel_group(),
        seed_offset=args.seed,
    )
    options = packing_options(args, family)
    state = None
    if args.dataloader_save and args.iteration:
        state = read_state(args.dataloader_save, args.iteration, replica, replicas)
    return [
        EnergonStream(
            partial(make_loader, args.energon, options, workers, split),
            state if split == "train" else None,
        )
        for split in ("train", "val", "test")
    ]


def packing_options(args: argparse.Namespace, family: VisionLanguage) -> PackingOptions:
    """What Megatron's arguments say of sequences."""
    from megatron.training import get_tokenizer

    plain = args.tokenizer_type == "NullTokenizer"
    return PackingOptions(
        sequence_length=args.seq_length,
        image_size=(args.img_h, args.img_w),
        pixels_per_token=args.patch_dim * args.spatial_merge_size,
        image_token=family.IMAGE_TOKEN,
        separator=get_tokenizer().eod,
        tokenize=byte_tokens(args.vocab_size) if plain else get_tokenizer().tokenize,
        dynamic=args.dynamic_image_sizes,
        position_axes=family.position_axes(args),
        buffer=args.packing_buffer,
    )
