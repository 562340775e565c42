"""A WebDataset of photographs, read by Energon, packed, and gone on with where it was left."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core.rerun_state_machine import RerunDataIterator
from megatron.energon import SkipSample, WorkerConfig

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.models.positions import positions_in_space
from megatron_pipeweaver.plugin.data import LookAhead
from megatron_pipeweaver.plugin.energon import EnergonStream, read_state
from megatron_pipeweaver.plugin.vision_language import VISION, VisionLanguage
from tests.photographs import CAPTIONS, make_dataset
from tests.unit.scripts.conftest import QUICKSTART, script_module

LENGTH, IMAGE, SEPARATOR, PER_IMAGE = 160, -200, 256, 4
Stream = Callable[..., EnergonStream]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("energon") / "photographs")


@pytest.fixture
def stream(dataset: Path) -> Stream:
    return partial(make_stream, dataset)


def make_stream(
    dataset: Path, state: Any = None, workers: int = 0, split: str = "train", **changed: Any
) -> EnergonStream:
    vlm_energon = script_module("vlm_energon", QUICKSTART.parent)
    options = vlm_energon.PackingOptions(
        sequence_length=LENGTH,
        image_size=changed.pop("image_size", (8, 8)),
        pixels_per_token=4,
        image_token=IMAGE,
        separator=SEPARATOR,
        tokenize=vlm_energon.byte_tokens(257),
        buffer=6,
        **changed,
    )
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    loader = partial(vlm_energon.make_loader, str(dataset), options, config, split)
    return EnergonStream(loader, state)


def documents(microbatch: Any) -> list[torch.Tensor]:
    ends = microbatch["cu_seqlens"].tolist()
    assert ends[0] == 0
    assert ends[-1] == LENGTH
    return [microbatch["tokens"][0, start:end] for start, end in itertools.pairwise(ends)]


def read(document: torch.Tensor) -> tuple[str, int]:
    """A document's text, and the images in it."""
    text = bytes(one for one in document.tolist() if 0 <= one < SEPARATOR).decode()
    return text, int((document == IMAGE).sum()) // PER_IMAGE


def test_every_sample_is_packed_whole_with_its_photographs(stream: Stream) -> None:
    seen = {}
    most_documents = most_images = 0
    for microbatch in itertools.islice(stream(), 12):
        shown = 0
        for document in documents(microbatch):
            text, images = read(document)
            shown += images
            if text:
                number = int(text.split(".")[0].removeprefix("Sample "))
                seen[number] = text
                assert images == number // 4 % 4
                assert sum(caption in text for caption in CAPTIONS.values()) <= images
                assert document[-1] == SEPARATOR
            else:  # what fills up
                assert set(document.tolist()) == {SEPARATOR}
        assert microbatch["images"].shape == (shown, 3, 8, 8)
        most_documents = max(most_documents, len(documents(microbatch)))
        most_images = max(most_images, shown)
    assert seen.keys() == {number for number in range(24) if number % 4 != 3}
    assert most_documents > 2
    assert most_images > 3


def test_tokens_predict_their_own_document_and_no_image(stream: Stream) -> None:
    for microbatch in itertools.islice(stream(), 4):
        predicted, positions = [], []
        for document in documents(microbatch):
            text, _ = read(document)
            follows = document[1:]
            counted = (follows != IMAGE) if text else torch.zeros_like(follows, dtype=torch.bool)
            predicted += [*follows.masked_fill(~counted, 0).tolist(), 0]
            positions += range(len(document))
        mask = microbatch["loss_mask"][0].bool()
        labels = microbatch["labels"][0]
        assert labels.tolist() == predicted
        assert mask.tolist() == [one != 0 for one in predicted]
        assert microbatch["position_ids"][0].tolist() == positions


def test_metadata_tells_documents_and_images(stream: Stream) -> None:
    args = argparse.Namespace(img_h=8, img_w=8, patch_dim=2, spatial_merge_size=2, hf_model=None)
    microbatch = next(stream())
    found = VisionLanguage().describe(args)(microbatch)
    assert found.sequence_length == LENGTH
    assert found.samples == 1
    assert list(found.document_lengths) == [len(one) for one in documents(microbatch)]
    assert found.count(VISION) == len(microbatch["images"])
    assert {(one.units, one.tokens) for one in found.items[VISION]} == {(16, PER_IMAGE)}


def test_photographs_may_keep_their_shape(stream: Stream) -> None:
    shapes = set()
    for microbatch in itertools.islice(
        stream(image_size=(16, 16), dynamic=True, position_axes=3), 6
    ):
        assert microbatch["position_ids"].shape == (3, 1, LENGTH)
        grids = [(one.shape[1] // 4, one.shape[2] // 4) for one in microbatch["images"]]
        shapes.update(grids)
        ends = microbatch["cu_seqlens"].tolist()
        for document, start, end in zip(documents(microbatch), ends[:-1], ends[1:], strict=True):
            shown, count = [], int((document == IMAGE).sum())
            while sum(rows * columns for rows, columns in shown) < count:
                shown.append(grids.pop(0))
            expected = positions_in_space(document, IMAGE, shown)
            assert torch.equal(microbatch["position_ids"][:, 0, start:end], expected)
        assert not grids
    assert len(shapes) > 1
    assert all(1 <= rows * columns <= 16 for rows, columns in shapes)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 100), (56, 56)),
        ((50, 200), (28, 112)),  # as few pixels, in its own shape
        ((30, 20), (28, 28)),  # small ones stay small
        ((3, 5000), (28, 112)),  # the thinnest ones are cut short
        ((5, 5), (28, 28)),
    ],
)
def test_images_are_resized_to_squares_of_their_own_shape(
    size: tuple[int, int], expected: tuple[int, int], vlm_energon: ModuleType
) -> None:
    assert vlm_energon.fitted_size(*size, 28, 56 * 56) == expected


def test_a_resumed_run_reads_what_the_uninterrupted_one_reads(
    dataset: Path, tmp_path: Path
) -> None:
    read_on(dataset, 0, tmp_path)


def test_reader_processes_go_on_where_they_were(dataset: Path, tmp_path: Path) -> None:
    # Readers are forked, which a process that has run many other tests may not survive.
    process = multiprocessing.get_context("spawn").Process(
        target=read_on, args=(dataset, 1, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == 0


def read_on(dataset: Path, workers: int, folder: Path) -> None:
    """Reads, stops with two microbatches read ahead, and goes on from what Megatron saves."""
    look, source = LookAhead(), RerunDataIterator(make_stream(dataset, workers=workers))
    for _ in range(3):
        source.advance()
        look.take(source, 2)
        look.peek(source, 2)
    # As Megatron writes it beside a checkpoint.
    saved = folder / "iter_0000003" / "mp_rank_00_000"
    saved.mkdir(parents=True)
    state = {"dataloader_state_dict": source.iterable.save_state()}
    torch.save(state, saved / "train_dataloader_dprank000.pt")
    rest = [one for _ in range(3) for one in look.take(source, 2)]

    resumed = make_stream(dataset, read_state(folder, 3, 0, 1), workers)
    for expected, found in zip(rest, resumed, strict=False):
        assert expected is not None
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_state_of_another_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"states of 0 replicas at iteration 3, .* this job has 1"
    ):
        read_state(tmp_path, 3, 0, 1)
    path = tmp_path / "iter_0000003" / "mp_rank_00" / "train_dataloader_dprank000.pt"
    path.parent.mkdir(parents=True)
    torch.save({"dataloader_state_dict": Path("code")}, path)
    with pytest.raises(ConfigError, match="is no state of a data loader"):
        read_state(tmp_path, 3, 0, 1)


def test_other_splits_are_read_in_order_over_and_over(stream: Stream) -> None:
    microbatches = list(itertools.islice(stream(split="val"), 5))
    texts = "".join(read(document)[0] for one in microbatches for document in documents(one))
    for number in range(24):
        assert (f"Sample {number}." in texts) == (number % 4 == 3), number
    first, again = [
        one for one in microbatches if "Sample 3." in "".join(read(d)[0] for d in documents(one))
    ][:2]
    assert torch.equal(first["tokens"], again["tokens"])


def test_a_sample_may_be_a_caption_behind_its_images(vlm_energon: ModuleType) -> None:
    image = torch.zeros(3, 4, 4)
    keys = {"__key__": "a", "__restore_key__": (), "__sources__": ()}
    sample = vlm_energon.cook({**keys, "b.png": image + 1, "a.jpg": image, "txt": "Words."})
    assert [one if isinstance(one, str) else one.mean() for one in sample.parts] == [0, 1, "Words."]
    with pytest.raises(SkipSample, match=r"a: has no \['c.jpg'\]"):
        vlm_energon.cook({**keys, "json": [{"image": "c.jpg"}]})


def test_images_of_any_size_get_the_models(vlm_energon: ModuleType) -> None:
    white = torch.ones(3, 5, 9)
    fitted = vlm_energon.fit_image(white, (8, 8))
    assert fitted.shape == (3, 8, 8)
    expected = (1 - 0.48145466) / 0.26862954
    torch.testing.assert_close(fitted[0], torch.full((8, 8), expected))
    assert vlm_energon.fit_image(torch.ones(1, 30, 20), (8, 4)).shape == (3, 8, 4)
    assert vlm_energon.fit_image(torch.ones(4, 8, 8), (8, 8)).shape == (3, 8, 8)


def test_without_a_tokenizer_bytes_need_room_in_the_vocabulary(vlm_energon: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size 63: .* takes 256 tokens"):
        vlm_energon.byte_tokens(63)


def test_packed_samples_are_one_per_microbatch(vlm_energon: ModuleType) -> None:
    with pytest.raises(ConfigError, match="give --micro-batch-size 1"):
        vlm_energon.energon_streams(argparse.Namespace(micro_batch_size=2), VisionLanguage())
