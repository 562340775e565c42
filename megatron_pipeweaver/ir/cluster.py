"""Devices, links and parallel sizes: what the hardware can do."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pipeweaver.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator (or the CPU cores of one rank), from its data sheet.

    Rates are per second and per direction; `flops` is dense bf16.
    """

    name: str
    flops: int
    memory_bytes: int
    memory_bandwidth: int
    scale_up_bandwidth: int
    scale_out_bandwidth: int
    host_bandwidth: int
    link_latency_ns: int = 5_000

    def __post_init__(self) -> None:
        for what in (
            "flops",
            "memory_bytes",
            "memory_bandwidth",
            "scale_up_bandwidth",
            "scale_out_bandwidth",
            "host_bandwidth",
        ):
            if getattr(self, what) < 1:
                raise ConfigError(f"device {self.name!r}: {what} must be >= 1")
        if self.link_latency_ns < 0:
            raise ConfigError(f"device {self.name!r}: link_latency_ns must be >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelSizes:
    """How many ways each kind of parallelism splits the job (Megatron's names).

    Expert-parallel ranks are data- and context-parallel ones that divide the experts among them.
    """

    pipeline: int
    tensor: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for what in ("pipeline", "tensor", "data", "context", "expert"):
            if getattr(self, what) < 1:
                raise ConfigError(f"parallel sizes: {what} is {getattr(self, what)}; need >= 1")
        if self.data * self.context % self.expert:
            raise ConfigError(
                f"parallel sizes: {self.data} data x {self.context} context parallel ranks do not "
                f"make groups of {self.expert} expert-parallel ones; choose a divisor"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.pipeline * self.tensor * self.data * self.context
