"""Sockets under httpx2 that keep one deadline for a whole exchange. Imported with the first request, as httpx2 is.

httpx2 gives every read a timeout of its own, so a server that sends a byte now and then is never late: neither in a
body nor, before there is one, in the headers. Its pool (httpcore2) takes a network backend for just this, but httpx2
has no argument for it; so ``keep`` puts ours around the one that a client's pools have.

The deadline is that of the thread, because an exchange is one thread's. Sending moves it: what is slow to go up is
not late, as long as it goes; the time to answer counts from the last byte that went.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any

import httpcore2
import httpx2

__all__ = ["Deadline", "keep"]

_SLICE = 64 * 1024  # bytes that have to go within one timeout


class Deadline(threading.local):
    """Until when this thread's exchange may take, by ``clock``, and how long it may take to answer, in seconds."""

    until = math.inf
    timeout = math.inf

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def begin(self, timeout: float) -> None:
        """It counts from now."""
        self.timeout, self.until = timeout, self._clock() + timeout

    def again(self) -> None:
        """It counts anew."""
        self.until = self._clock() + self.timeout

    def left(self, most: float | None) -> float:
        """Seconds that are left for one operation, ``most`` at most; zero or less: none."""
        return min(self.until - self._clock(), math.inf if most is None else most)


def keep(client: httpx2.Client, deadline: Deadline) -> None:
    """Have all connections that ``client`` will make keep ``deadline``."""
    for transport in (client._transport, *client._mounts.values()):
        if isinstance(transport, httpx2.HTTPTransport):
            pool = transport._pool
            pool._network_backend = _Backend(pool._network_backend, deadline)


class _Backend(httpcore2.NetworkBackend):
    def __init__(self, inner: httpcore2.NetworkBackend, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        left = _positive(self._deadline.left(timeout), httpcore2.ConnectTimeout)
        return _Stream(self._inner.connect_tcp(host, port, left, local_address, socket_options), self._deadline)


class _Stream(httpcore2.NetworkStream):
    def __init__(self, inner: httpcore2.NetworkStream, deadline: Deadline) -> None:
        self._inner, self._deadline = inner, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _positive(self._deadline.left(timeout), httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        view = memoryview(buffer)
        for start in range(0, len(view), _SLICE):
            left = _positive(self._deadline.left(timeout), httpcore2.WriteTimeout)
            self._inner.write(bytes(view[start : start + _SLICE]), left)
            self._deadline.again()

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = _positive(self._deadline.left(timeout), httpcore2.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _positive(seconds: float, error: type[Exception]) -> float | None:
    if seconds <= 0:
        raise error("the time is over")
    return None if math.isinf(seconds) else seconds
