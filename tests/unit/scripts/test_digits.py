from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pipeweaver.errors import ConfigError

ITERATIONS = 20


@pytest.fixture(scope="module")
def task(digits: ModuleType) -> Any:
    train, _ = digits.load_split()
    return digits.DigitsTask(digits.TaskConfig(), train)


def text_of(digits: ModuleType, tokens: torch.Tensor) -> str:
    return " ".join(digits.VOCABULARY[token] for token in tokens.tolist())


def test_split_holds_every_image_once(digits: ModuleType) -> None:
    train, held_out = digits.load_split()
    assert (len(train.digits), len(held_out.digits)) == (1500, 297)
    ours = np.concatenate([train.images, held_out.images]).reshape(1797, -1)
    source = digits.load_digits().images.reshape(1797, -1)
    back = np.rint((ours * digits._DEVIATION + digits._MEAN) * digits._INK)
    assert sorted(map(tuple, back)) == sorted(map(tuple, source))


def test_split_is_the_same_every_time(digits: ModuleType) -> None:
    first, second = digits.load_split(), digits.load_split()
    assert np.array_equal(first[1].images, second[1].images)
    assert np.array_equal(first[1].digits, second[1].digits)


def test_microbatch_depends_on_seed_iteration_and_index_alone(
    digits: ModuleType, task: Any
) -> None:
    train, _ = digits.load_split()
    again = digits.DigitsTask(digits.TaskConfig(), train)
    again.microbatch(9, 1)
    for name, tensor in task.microbatch(3, 2).tensors.items():
        assert torch.equal(tensor, again.microbatch(3, 2).tensors[name])
    other_seed = digits.DigitsTask(digits.TaskConfig(seed=1), train)
    texts = {
        text_of(digits, one.tensors["tokens"].flatten())
        for one in (
            task.microbatch(3, 2),
            task.microbatch(4, 2),
            task.microbatch(3, 1),
            other_seed.microbatch(3, 2),
        )
    }
    assert len(texts) == 4


def test_metadata_ahead_of_time_is_that_of_the_tensors(task: Any) -> None:
    for iteration in range(ITERATIONS):
        ahead = task.metadata(iteration).microbatches
        assert len(ahead) == task.config.microbatches
        for index, expected in enumerate(ahead):
            one = task.microbatch(iteration, index)
            assert one.metadata == expected
            assert one.tensors["tokens"].shape == (expected.samples, expected.sequence_length)
            assert len(one.tensors["images"]) == expected.count("vision")


def test_every_batch_has_another_mix_and_some_microbatches_no_image(task: Any) -> None:
    counts = [
        tuple(one.count("vision") for one in task.metadata(iteration).microbatches)
        for iteration in range(ITERATIONS)
    ]
    assert len(set(counts)) == ITERATIONS
    without = [sum(count == 0 for count in batch) for batch in counts]
    assert 0 < sum(without) < ITERATIONS * task.config.microbatches
    assert len(set(without)) > 1


def test_sequences_show_0_to_12_images(digits: ModuleType, task: Any) -> None:
    shown = set()
    for iteration in range(60):
        for index in range(task.config.microbatches):
            tokens = task.microbatch(iteration, index).tensors["tokens"]
            placeholders = (tokens == digits.IMAGE).sum(1)
            assert not (placeholders % task.config.tokens_per_image).any()
            shown.update((placeholders // task.config.tokens_per_image).tolist())
    assert shown == set(range(13))


def test_placeholders_stand_in_the_order_of_the_images(digits: ModuleType, task: Any) -> None:
    train, _ = digits.load_split()
    digit_of = dict(zip(map(bytes, train.images), train.digits, strict=True))
    for index in range(task.config.microbatches):
        tensors = task.microbatch(0, index).tensors
        told = tensors["labels"][digits.answer_kinds(tensors)]
        read = [digit_of[bytes(image[0].numpy())] for image in tensors["images"]]
        assert [digits.VOCABULARY[token] for token in told.tolist()] == [str(one) for one in read]


def test_loss_counts_answers_only(digits: ModuleType, task: Any) -> None:
    for index in range(task.config.microbatches):
        tensors = task.microbatch(1, index).tensors
        counted = tensors["loss_mask"].bool()
        told = {digits.VOCABULARY[token] for token in tensors["labels"][counted].tolist()}
        assert told <= set("0123456789")
        assert counted[digits.answer_kinds(tensors)].all()
        assert counted.any(1).all()


def test_sums_are_right(digits: ModuleType, task: Any) -> None:
    values = {word: value for value, word in enumerate(digits.NUMBER_WORDS)}
    values |= {str(value): value for value in range(10)}
    seen = 0
    for iteration in range(ITERATIONS):
        one = task.microbatch(iteration, 0).tensors
        for tokens, last in zip(one["tokens"], one["labels"][:, -1:], strict=True):
            text = text_of(digits, torch.cat([tokens, last])).replace(" <pad>", "")
            for part in text.split("sum ")[1:]:
                question, answer = part.split(" = ")
                first, second = question.split(" plus ")
                assert values[first] + values[second] == int(answer.replace(" ", ""))
                seen += 1
    assert seen > 100


def test_reading_test_asks_for_every_held_out_image_once(digits: ModuleType) -> None:
    _, held_out = digits.load_split()
    task = digits.DigitsTask(digits.TaskConfig(samples=4), held_out)
    images, told = [], []
    for one in task.reading_test():
        images.append(one.tensors["images"][:, 0])
        told += one.tensors["labels"][digits.answer_kinds(one.tensors)].tolist()
    assert np.array_equal(torch.cat(images).numpy(), held_out.images)
    assert [digits.VOCABULARY[token] for token in told] == [str(one) for one in held_out.digits]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"microbatches": 0}, "microbatches=0"),
        ({"samples": -1}, "samples=-1"),
        ({"patch_size": 3}, "patch_size is 3; it must divide 8"),
    ],
)
def test_wrong_sizes_are_refused(digits: ModuleType, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digits.TaskConfig(**wrong)


def test_a_microbatch_that_is_not_there_is_refused(task: Any) -> None:
    with pytest.raises(ConfigError, match="microbatch 8 of iteration 0; there are 8"):
        task.microbatch(0, 8)
