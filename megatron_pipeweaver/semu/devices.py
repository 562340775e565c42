"""Device profiles: data-sheet rates plus efficiency factors, read from JSON files.

The package ships ``H100``, ``H800``, ``H200``, ``H20``, ``A100``, ``B200`` and ``cpu``; a path to
a file of the same form (``pipeweaver.device/1``) serves as well as a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_pipeweaver.errors import ConfigError
from megatron_pipeweaver.ir.cluster import DeviceSpec
from megatron_pipeweaver.ir.codec import check_format, to_bytes
from megatron_pipeweaver.ir.json_reader import JsonNode, parse_json
from megatron_pipeweaver.semu.work import OperatorClass, Phase

DEVICE_FORMAT = "pipeweaver.device/1"
_SPEC_KEYS = (
    "flops",
    "memory_bytes",
    "memory_bandwidth",
    "scale_up_bandwidth",
    "scale_out_bandwidth",
    "host_bandwidth",
    "link_latency_ns",
)
_FACTOR_KEYS = (
    "compute_permille",
    "memory_permille",
    "network_permille",
    "overhead_ns",
)
_GRADIENT_KEYS = ("input_grad", "weight_grad")
_PROFILE_NUMBERS = ("scale_up_ranks", "layer_forward_ns", "layer_backward_ns")
_PROFILE_OPTIONS = (
    "layer_forward_permille",
    "layer_backward_permille",
    "kernel_forward_ns",
    "kernel_backward_ns",
    "checkpoint_forward_ns",
    "checkpoint_backward_ns",
)
_HALF_KEY = "half_sizes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """How much of the data sheet an operator class reaches, in thousandths, and its launch cost.

    `half_sizes` are the sizes ``(m, n, k)`` at which a matmul reaches half of its rate because of
    that size alone. The gradients have these factors too, unless they have their own.
    """

    compute_permille: int = 1000
    memory_permille: int = 1000
    network_permille: int = 1000
    overhead_ns: int = 0
    half_sizes: tuple[int, ...] = ()
    input_grad: Factors | None = None
    weight_grad: Factors | None = None

    def __post_init__(self) -> None:
        for what in _FACTOR_KEYS:
            if what == "overhead_ns":
                continue
            if getattr(self, what) < 1:
                raise ConfigError(f"device factors: {what} is {getattr(self, what)}; need >= 1")
        if self.overhead_ns < 0 or any(size < 0 for size in self.half_sizes):
            raise ConfigError("device factors: overhead_ns and half_sizes must be >= 0")

    def of(self, phase: Phase) -> Factors:
        """The factors of one phase."""
        own = {Phase.INPUT_GRAD: self.input_grad, Phase.WEIGHT_GRAD: self.weight_grad}.get(phase)
        return self if own is None else own


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device with its factors by operator class; classes that are not named reach all of it.

    `scale_up_ranks` is how many ranks share the fast link; `source` says where numbers are from.
    In a model, operators take `layer_forward_permille` thousandths of what they take alone, and on
    top `kernel_forward_ns` a kernel, and `layer_forward_ns` a layer: what the framework spends
    between them where the device has to wait for it. Likewise backward. What runs again costs
    `checkpoint_forward_ns` and `checkpoint_backward_ns` more, for keeping inputs and random states.
    """

    spec: DeviceSpec
    factors: Mapping[OperatorClass, Factors] = field(default_factory=dict)
    scale_up_ranks: int = 8
    layer_forward_ns: int = 0
    layer_backward_ns: int = 0
    layer_forward_permille: int = 1000
    layer_backward_permille: int = 1000
    kernel_forward_ns: int = 0
    kernel_backward_ns: int = 0
    checkpoint_forward_ns: int = 0
    checkpoint_backward_ns: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if self.scale_up_ranks < 1:
            raise ConfigError(f"device {self.spec.name!r}: scale_up_ranks must be >= 1")
        if min(self._framework_ns) < 0:
            raise ConfigError(
                f"device {self.spec.name!r}: layers, kernels and checkpoints cannot take less than "
                "0 ns"
            )
        if min(self.layer_forward_permille, self.layer_backward_permille) < 1:
            raise ConfigError(f"device {self.spec.name!r}: layer permille must be >= 1")

    def factors_of(self, kind: OperatorClass) -> Factors:
        """The factors of one operator class, or of the one that it is a kind of."""
        return self.factors.get(kind) or self.factors.get(_KIND_OF.get(kind, kind), _PERFECT)

    @property
    def has_layer_factors(self) -> bool:
        """Whether layers take other times than their operators."""
        stretches = (self.layer_forward_permille, self.layer_backward_permille)
        return stretches != (1000, 1000) or max(self._framework_ns) > 0

    @property
    def _framework_ns(self) -> tuple[int, ...]:
        return (
            self.layer_forward_ns,
            self.layer_backward_ns,
            self.kernel_forward_ns,
            self.kernel_backward_ns,
            self.checkpoint_forward_ns,
            self.checkpoint_backward_ns,
        )

    def layer_forward(self, operators_ns: int, *, layers: int, kernels: int = 0) -> int:
        """Nanoseconds of the forward of `layers` layers whose operators take `operators_ns`."""
        return (
            operators_ns * self.layer_forward_permille // 1000
            + layers * self.layer_forward_ns
            + kernels * self.kernel_forward_ns
        )

    def layer_backward(self, operators_ns: int, *, layers: int, kernels: int = 0) -> int:
        """The same of a backward."""
        return (
            operators_ns * self.layer_backward_permille // 1000
            + layers * self.layer_backward_ns
            + kernels * self.kernel_backward_ns
        )


_PERFECT = Factors()
_KIND_OF = MappingProxyType({OperatorClass.GATED_ACTIVATION: OperatorClass.ACTIVATION})


def profile_from_json(data: bytes, source: str) -> DeviceProfile:
    """The profile in the file bytes `data`.

    Raises:
        ConfigError: the bytes are not a valid `pipeweaver.device/1`.
    """
    root = check_format(
        parse_json(data, source),
        DEVICE_FORMAT,
        {"name", "source", "spec", "factors", *_PROFILE_NUMBERS},
        optional=set(_PROFILE_OPTIONS),
    )
    spec = root["spec"].keys(frozenset(_SPEC_KEYS))
    factors: dict[OperatorClass, Factors] = {}
    for name, node in root["factors"].entries():
        if name not in {one.value for one in OperatorClass}:
            node.fail(f"is no operator class; use one of {[one.value for one in OperatorClass]}")
        factors[OperatorClass(name)] = _read_factors(node)
    return DeviceProfile(
        spec=DeviceSpec(
            name=root["name"].text(), **{key: spec[key].integer() for key in _SPEC_KEYS}
        ),
        factors=factors,
        **{key: root[key].integer() for key in _PROFILE_NUMBERS},
        **_integers(root, _PROFILE_OPTIONS),
        source=root["source"].text(),
    )


def _integers(node: JsonNode, keys: tuple[str, ...]) -> dict[str, int]:
    """Those of `keys` that `node` has."""
    return {key: found.integer() for key in keys if (found := node.get(key)) is not None}


def _read_factors(node: JsonNode, *, nested: bool = True) -> Factors:
    gradients = _GRADIENT_KEYS if nested else ()
    node.keys(frozenset(), optional=frozenset({*_FACTOR_KEYS, _HALF_KEY, *gradients}))
    halves = node.get(_HALF_KEY)
    sizes = () if halves is None else tuple(one.integer() for one in halves.array(3))
    fields: dict[str, Any] = {**_integers(node, _FACTOR_KEYS), _HALF_KEY: sizes}
    for key in gradients:
        own = node.get(key)
        if own is not None:
            fields[key] = _read_factors(own, nested=False)
    return Factors(**fields)


def profile_to_json(profile: DeviceProfile) -> bytes:
    """`profile` as file bytes."""
    return to_bytes(
        {
            "format": DEVICE_FORMAT,
            "name": profile.spec.name,
            "source": profile.source,
            **{key: getattr(profile, key) for key in (*_PROFILE_NUMBERS, *_PROFILE_OPTIONS)},
            "spec": {key: getattr(profile.spec, key) for key in _SPEC_KEYS},
            "factors": {kind.value: _factors_json(one) for kind, one in profile.factors.items()},
        }
    )


def _factors_json(factors: Factors) -> dict[str, object]:
    found: dict[str, object] = {key: getattr(factors, key) for key in _FACTOR_KEYS}
    if factors.half_sizes:
        found[_HALF_KEY] = list(factors.half_sizes)
    for key in _GRADIENT_KEYS:
        own = getattr(factors, key)
        if own is not None:
            found[key] = _factors_json(own)
    return found


def shipped_devices() -> tuple[str, ...]:
    """Names of the profiles that come with the package."""
    folder = resources.files("megatron_pipeweaver.semu") / "data"
    return tuple(sorted(one.name[:-5] for one in folder.iterdir() if one.name.endswith(".json")))


def load_device(name_or_path: str) -> DeviceProfile:
    """A shipped profile by name, or any by the path of its file.

    Raises:
        ConfigError: there is neither such a name nor such a file, or the file is not valid.
    """
    names = {name.lower(): name for name in shipped_devices()}
    if name_or_path.lower() in names:
        file = f"{names[name_or_path.lower()]}.json"
        data = (resources.files("megatron_pipeweaver.semu") / "data" / file).read_bytes()
        return profile_from_json(data, file)
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"device {name_or_path!r}: no such file, and the shipped profiles are "
            f"{list(shipped_devices())}"
        )
    return profile_from_json(path.read_bytes(), str(path))
