from __future__ import annotations

from types import ModuleType

import pytest

from megatron_pipeweaver.errors import ConfigError


def test_model_takes_what_the_task_gives(digits: ModuleType, recipe: ModuleType) -> None:
    model = recipe.model_spec()
    vision = model.module(digits.MODULE)
    assert vision.patch_size == recipe.RECIPE.task.patch_size
    assert vision.output_size == model.backbone.hidden_size
    assert model.backbone.vocab_size == len(digits.VOCABULARY)


def test_every_rank_can_hold_two_segments_of_either_module(recipe: ModuleType) -> None:
    assert all(module.layers == 8 for module in recipe.model_spec().modules)


def test_typical_microbatch_is_within_what_can_occur(
    digits: ModuleType, recipe: ModuleType
) -> None:
    train, _ = digits.load_split()
    task = digits.DigitsTask(recipe.RECIPE.task, train)
    seen = [one for iteration in range(20) for one in task.metadata(iteration).microbatches]
    counts = [one.count(digits.MODULE) for one in seen]
    lengths = [one.sequence_length for one in seen]
    assert min(counts) < recipe.RECIPE.typical_images < max(counts)
    assert min(lengths) < recipe.RECIPE.typical_sequence_length < max(lengths)


def test_learning_rate_warms_up_and_decays(recipe: ModuleType) -> None:
    rates = [recipe.learning_rate(iteration, 100) for iteration in range(100)]
    peak = rates.index(max(rates))
    assert peak in {recipe.RECIPE.warmup - 1, recipe.RECIPE.warmup}
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(
        recipe.RECIPE.final_share * recipe.RECIPE.learning_rate, rel=0.01
    )


def test_no_iterations_are_refused(recipe: ModuleType) -> None:
    with pytest.raises(ConfigError, match="iterations=0"):
        recipe.Recipe(iterations=0)
