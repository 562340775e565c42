from types import SimpleNamespace

import pytest

from megatron_pipeweaver.plugin.patching import Patch, PatchSet


class Base:
    def name(self) -> str:
        return "base"


class Derived(Base):
    pass


def test_applies_and_restores():
    target = SimpleNamespace(a=1, b=2)
    patches = PatchSet([Patch(target, "a", 10), Patch(target, "b", 20)])
    assert not patches.applied
    patches.apply()
    assert (target.a, target.b, patches.applied) == (10, 20, True)
    patches.restore()
    assert (target.a, target.b, patches.applied) == (1, 2, False)


def test_same_attribute_twice_ends_with_the_original():
    target = SimpleNamespace(a=1)
    with PatchSet([Patch(target, "a", 2), Patch(target, "a", 3)]):
        assert target.a == 3
    assert target.a == 1


def test_applying_twice_does_not_lose_the_original():
    target = SimpleNamespace(a=1)
    patches = PatchSet([Patch(target, "a", 2)])
    patches.apply()
    patches.apply()
    patches.restore()
    patches.restore()
    assert target.a == 1


def test_inherited_attribute_is_inherited_again():
    with PatchSet([Patch(Derived, "name", lambda self: "patched")]):
        assert Derived().name() == "patched"
    assert "name" not in vars(Derived)
    assert Derived().name() == "base"


def test_static_methods_stay_static():
    class Holder:
        @staticmethod
        def value() -> int:
            return 1

    before = vars(Holder)["value"]
    with PatchSet([Patch(Holder, "value", staticmethod(lambda: 2))]):
        assert Holder().value() == 2
    assert vars(Holder)["value"] is before


def test_missing_attribute_undoes_what_was_done():
    target = SimpleNamespace(a=1)
    with pytest.raises(AttributeError):
        PatchSet([Patch(target, "a", 2), Patch(target, "absent", 3)]).apply()
    assert target.a == 1


def test_error_inside_still_restores():
    target = SimpleNamespace(a=1)
    with pytest.raises(ValueError, match="inside"), PatchSet([Patch(target, "a", 2)]):
        raise ValueError("inside")
    assert target.a == 1
