import inspect

import pytest

from megatron_pipeweaver import errors

KINDS = [one for _, one in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_can_be_caught_as_one_and_ends_a_command_with_2(kind):
    assert issubclass(kind, errors.PipeWeaverError)
    assert kind("said so").exit_code == 2
    assert str(kind("said so")) == "said so"


def test_the_kinds_the_house_names_are_there():
    names = {kind.__name__.removesuffix("Error") for kind in KINDS}
    assert {"Config", "Infeasible", "PlanInvalid", "PlanMismatch", "PlannerTimeout"} <= names
