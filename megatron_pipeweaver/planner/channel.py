"""Messages between a training process and its planner: length-prefixed bytes over a socket.

The training's end never blocks beyond a given time, whatever the other end does: what a stopped
planner does not read waits here.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import struct
import time

from megatron_pipeweaver.errors import ConfigError, TransferError

_LENGTH = struct.Struct(">Q")
_CHUNK = 1 << 20
MAX_MESSAGE_BYTES = 1 << 30
"""Longer messages are none: whatever sent the length speaks another language."""


class Channel:
    """One end of a stream socket that carries whole messages; owns the socket.

    Raises:
        TransferError: (by all methods) the other end is gone.
        ConfigError: (by `receive`) what arrives is not a message.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._outgoing = bytearray()
        self._incoming = bytearray()

    def send(self, message: bytes) -> None:
        """Queue `message` and write what can be written at once."""
        self._outgoing += _LENGTH.pack(len(message)) + message
        self._write()

    def flush(self, timeout_s: float | None = None) -> None:
        """Returns when everything is written, or the time is up."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while self._outgoing:
            left = None if until is None else until - time.monotonic()
            if left is not None and left < 0:
                return
            self._wait(select.POLLOUT, left)
            self._write()

    def receive(self, timeout_s: float | None) -> bytes | None:
        """The next message; `None` when `timeout_s` (`None`: for ever) passed without one."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while (message := self._next()) is None:
            left = None if until is None else max(0.0, until - time.monotonic())
            wanted = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
            happened = self._wait(wanted, left)
            if happened & select.POLLOUT:
                self._write()
            if happened & ~select.POLLOUT:
                self._read()
            if not happened and left is not None:
                return None
        return message

    def twin(self) -> Channel:
        """Another channel over the same connection, for a thread that goes the other way."""
        return Channel(self._socket.dup())

    def shut_down(self) -> None:
        """End the connection: both ends, and threads that wait here, read its end."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; the other end reads its end."""
        self._socket.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, events: int, timeout_s: float | None) -> int:
        """Those of `events` that happened, or that the other end is gone; 0 for none in time.

        By `poll`, since a rank of a large job has more than the 1024 descriptors of `select`.
        """
        waiting = select.poll()
        waiting.register(self._socket, events)
        longest_ms = (1 << 31) - 1
        found = waiting.poll(
            None if timeout_s is None else min(longest_ms, math.ceil(timeout_s * 1e3))
        )
        return found[0][1] if found else 0

    def _next(self) -> bytes | None:
        if len(self._incoming) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._incoming)
        if length > MAX_MESSAGE_BYTES:
            raise ConfigError(f"planner channel: a message of {length} bytes; not a message")
        end = _LENGTH.size + length
        if len(self._incoming) < end:
            return None
        message = bytes(self._incoming[_LENGTH.size : end])
        del self._incoming[:end]
        return message

    def _read(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            raise TransferError(f"planner channel: {error}") from error
        if not data:
            raise TransferError("planner channel: the other end is closed")
        self._incoming += data

    def _write(self) -> None:
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing[:_CHUNK])
                del self._outgoing[:sent]
        except BlockingIOError:
            return
        except OSError as error:
            raise TransferError(f"planner channel: {error}") from error
