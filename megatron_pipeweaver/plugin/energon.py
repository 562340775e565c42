"""Megatron Energon's data loaders as Megatron's training loop takes them: iterators with a state.

loader ─► EnergonStream ─► the look-ahead of `plugin.data` ─► training
                ▲
    restore_stream, from what Megatron wrote beside the last checkpoint
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.energon import SavableDataLoader
from megatron.energon.flavors.webdataset.sample_loader import SliceState
from megatron.energon.rng import SystemRngState
from megatron.energon.savable_loader import (
    SavableDataLoaderState,
    SavableDatasetCheckpoint,
    SavableDatasetState,
)
from megatron.energon.state import FlexState

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.plugin.data import LoaderState

_STATES: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        SavableDataLoaderState,
        SavableDatasetCheckpoint,
        SavableDatasetState,
        SliceState,
        SystemRngState,
    )
}
"""The dataclasses that Energon's states are made of, beside plain values and `FlexState`."""
_KIND = "energon"


class EnergonStream:
    """Microbatch after microbatch of an Energon loader; a `SavableIterator`.

    The loader is made at the first use: Megatron makes one stream per chunk of a rank, and reads
    one of them.

    Args:
        make: makes the loader, of batches that are mappings.
        state: where to go on; at the beginning, if `None`.
    """

    def __init__(
        self, make: Callable[[], SavableDataLoader[Any]], state: LoaderState | None = None
    ) -> None:
        self._make = make
        self._start = state
        self._reading: tuple[SavableDataLoader[Any], Iterator[Any]] | None = None

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return self

    def __next__(self) -> Mapping[str, Any]:
        _, batches = self._opened()
        batch: Mapping[str, Any] = next(batches)
        return batch

    def save_state(self) -> LoaderState:
        """The state behind the last microbatch."""
        loader, _ = self._opened()
        return LoaderState(source=plain_state(loader.save_state_rank()), skip=0)

    def _opened(self) -> tuple[SavableDataLoader[Any], Iterator[Any]]:
        if self._reading is None:
            loader = self._make()
            if self._start is not None:
                loader.restore_state_rank(state_from_plain(self._start["source"]))
            batches = _without_end(loader)
            for _ in range(self._start["skip"] if self._start is not None else 0):
                next(batches)
            self._reading = loader, batches
        return self._reading


def _without_end(loader: SavableDataLoader[Any]) -> Iterator[Any]:
    """Pass after pass over `loader`; a loader for training has one without end itself."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ConfigError(
                "--energon: a split of the data set makes no sequence; give it more samples, "
                "longer sequences, or --eval-iters 0"
            )


def read_state(folder: str | Path, iteration: int, replica: int, replicas: int) -> LoaderState:
    """What ``--dataloader-save`` wrote for a data-parallel rank at `iteration`.

    Args:
        folder: the one that the flag names.
        iteration: of the checkpoint.
        replica: the data-parallel rank.
        replicas: how many there are.

    Raises:
        ConfigError: it is not there, or holds anything but a loader's state.
    """
    # Megatron's folder names tensor and pipeline rank 0, the latter where there are several.
    written = Path(folder, f"iter_{iteration:07d}").glob("mp_rank_00*/train_dataloader_dprank*.pt")
    found = sorted(written)
    if len(found) != replicas:
        raise ConfigError(
            f"--dataloader-save {folder}: has the states of {len(found)} replicas at iteration "
            f"{iteration}, and this job has {replicas}; resume with as many, or leave the flag out "
            "to begin the data anew"
        )
    path = found[replica]
    try:
        # Plain values alone: nothing that is read is run.
        saved = torch.load(path, weights_only=True)["dataloader_state_dict"]
        return LoaderState(source=saved["source"], skip=int(saved["skip"]))
    except Exception as error:
        raise ConfigError(
            f"{path}: is no state of a data loader that PipeWeaver saved ({error!r})"
        ) from error


def plain_state(state: Any) -> Any:
    """An Energon state as plain values, which can be read from disk without running anything."""
    if isinstance(state, FlexState):
        return {_KIND: "FlexState", **_plain_items(state)}
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        name = type(state).__name__
        if name not in _STATES:
            raise ConfigError(f"state of the data: a {name} cannot be saved; use --num-workers 0")
        fields = {one.name: getattr(state, one.name) for one in dataclasses.fields(state)}
        return {_KIND: name, **_plain_items(fields)}
    if isinstance(state, dict):
        return _plain_items(state)
    if isinstance(state, list | tuple):
        return type(state)(plain_state(one) for one in state)
    return state


def state_from_plain(plain: Any) -> Any:
    """The state of which `plain_state` made `plain`."""
    if isinstance(plain, dict):
        items = {key: state_from_plain(one) for key, one in plain.items() if key != _KIND}
        kind = plain.get(_KIND)
        if kind is None:
            return items
        return FlexState(items) if kind == "FlexState" else _STATES[kind](**items)
    if isinstance(plain, list | tuple):
        return type(plain)(state_from_plain(one) for one in plain)
    return plain


def _plain_items(items: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key: plain_state(one) for key, one in items.items()}
