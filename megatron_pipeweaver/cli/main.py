"""``pipeweaver``: one verb per file, one line per error.

Exit codes: 0 done, 2 an error told in one line, 130 interrupted, 141 the reader of the output left.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn, Protocol

from megatron_pipeweaver import __version__
from megatron_pipeweaver.cli import calibrate, compare, emulate, show, solve, tune, verify
from megatron_pipeweaver.errors import ConfigError, PipeWeaverError

INTERRUPTED, READER_LEFT = 130, 141  # 128 + SIGINT, 128 + SIGPIPE: what shells report


class Verb(Protocol):
    """What a verb's module offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the verb's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit code."""


VERBS: Mapping[str, Verb] = {
    "solve": solve,
    "verify": verify,
    "compare": compare,
    "show": show,
    "emulate": emulate,
    "tune": tune,
    "calibrate": calibrate,
}


class _Parser(argparse.ArgumentParser):
    """Tells a wrong flag as every other error is told: in one line, by `main`."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; `Namespace.verb` names the chosen one."""
    parser = _Parser(
        prog="pipeweaver",
        description="Pipeline schedules for large multimodal models, and what training steps take.",
    )
    parser.add_argument("--version", action="version", version=f"pipeweaver {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        of_verb = verbs.add_parser(name, help=verb.HELP, description=verb.HELP)
        verb.add_arguments(of_verb)
        of_verb.add_argument("-v", "--verbose", action="store_true", help="log progress to stderr")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default); the exit code."""
    try:
        args = build_parser().parse_args(argv)
        with _logging_to_stderr(verbose=args.verbose):
            code = VERBS[args.verb].run(args)
        sys.stdout.flush()
    except PipeWeaverError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_stdout()
        return READER_LEFT
    except OSError as error:  # files have their own messages by now: this is the output
        _drop_stdout()
        return _fail(f"the output cannot be written ({error.strerror})", ConfigError.exit_code)
    return code


@contextmanager
def _logging_to_stderr(*, verbose: bool) -> Iterator[None]:
    """For the time of one command: warnings, or progress too, as lines on stderr."""
    logger, handler = logging.getLogger("megatron_pipeweaver"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("pipeweaver: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _fail(message: str, code: int) -> int:
    print(f"pipeweaver: error: {message}", file=sys.stderr)
    return code


def _drop_stdout() -> None:
    """Let what is still buffered go nowhere, so that the interpreter's exit stays quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
