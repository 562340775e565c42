"""Everything that can go wrong on purpose: one class per kind, one line per message.

A message says what is wrong, where, and what to do. The command line prints it as it stands and
ends with :attr:`PipeWeaverError.exit_code`.
"""

from __future__ import annotations


class PipeWeaverError(Exception):
    """Base of every error that PipeWeaver raises itself."""

    exit_code = 2


class ConfigError(PipeWeaverError):
    """A flag, a file or a specification is wrong, or asks for what cannot be had."""


class InfeasibleError(PipeWeaverError):
    """No schedule exists: one microbatch alone, at its leanest strategies, does not fit."""


class PlanInvalidError(PipeWeaverError):
    """A schedule or a plan breaks a rule; it must not run."""


class PlanMismatchError(PipeWeaverError):
    """Ranks hold different plans, or the batch in hand is not the one that was planned."""


class PlannerTimeoutError(PipeWeaverError):
    """No plan arrived in time and no fallback was allowed."""


class TransferError(PipeWeaverError):
    """A message between ranks did not arrive, arrived late, or a peer is gone."""


class UnsupportedMegatronError(PipeWeaverError):
    """This megatron-core version, or an option of it, is one that PipeWeaver does not run with."""
