"""How bytes get to the client that started a local run, and back: over a socket that the executor inherits.

Requests carry an id, and answers come in any order: one socket does for all threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fieldlab_common import errors as e
from fieldlab_common.protocol import PROBLEM

from fieldlab_executor.frames import Unpacker, pack
from fieldlab_executor.recall import Recall, Recalled
from fieldlab_executor.transport import BLOCK, Answer, FileBody, PipeClosed, Sink, shut

__all__ = ["PipeTransport", "pipe_of"]

PIPE_CHUNK = 1024 * 1024


@dataclass(eq=False)
class _Waiting:
    done: threading.Event = field(default_factory=threading.Event)
    recalled: bool = False
    status: int = 0
    body: bytes = b""


class PipeTransport:
    """Frames (``frames``) over a connected Unix socket, which it takes over.

    A request is ``{"id", "endpoint", "path", "query"}`` with its body, an answer ``{"id", "status"}`` with its;
    ``{"recall": id}`` says that an answer that has not gone out is not wanted any more. Blobs
    are asked for in pieces: ``offset`` and ``limit`` of the query.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.chunk = PIPE_CHUNK
        self._sock = sock
        sock.setblocking(True)
        # A peer that reads nothing for half a minute is gone; the reading thread waits as long as it takes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 30, 0))
        self._sending = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: dict[int, _Waiting] = {}
        self._last = 0
        self._gone = ""
        self._thread = threading.Thread(target=self._read, name="pipe", daemon=True)
        self._thread.start()

    def request(
        self,
        endpoint: str,
        *,
        path: Mapping[str, str] | None = None,
        query: Mapping[str, str | int | float] | None = None,
        body: bytes | FileBody | None = None,
        timeout: float,
        start: int = 0,
        sink: Sink | None = None,
        recall: Recall | None = None,
    ) -> Answer:
        """Ask over the one socket."""
        if sink is None:
            return self._ask(endpoint, path, query, body, timeout, recall)
        while True:
            part = self._ask(endpoint, path, {**(query or {}), "offset": start, "limit": PIPE_CHUNK}, body, timeout)
            if part.status >= 300:
                return part
            sink(start, part.body)
            start += len(part.body)
            if len(part.body) != PIPE_CHUNK:
                return Answer(status=206, headers=part.headers, sent=part.sent, received=part.received)

    def close(self) -> None:
        """End the conversation."""
        self._lost("The link is closed.")
        shut(self._sock)
        self._thread.join()
        self._sock.close()

    def _ask(
        self,
        endpoint: str,
        path: Mapping[str, str] | None,
        query: Mapping[str, str | int | float] | None,
        body: bytes | FileBody | None,
        timeout: float,
        recall: Recall | None = None,
    ) -> Answer:
        data = b"".join(body.blocks()) if isinstance(body, FileBody) else body or b""
        waiting = _Waiting()
        with self._lock:
            self._last += 1
            number = self._last
            self._waiting[number] = waiting
        try:
            header = {"id": number, "endpoint": endpoint, "path": dict(path or {}), "query": dict(query or {})}
            frame = pack(header, data)
            if recall is not None:
                recall.arm(waiting, lambda: self._take_back(number, waiting))
            self._send(frame)
            if not waiting.done.wait(timeout):
                raise e.DirectorTimeout(f"The client did not answer {endpoint!r} within {timeout:g} s.")
            if waiting.recalled:
                raise Recalled
            if not waiting.status:
                raise PipeClosed(self._gone)
        finally:
            if recall is not None:
                recall.disarm(waiting)
            with self._lock:
                self._waiting.pop(number, None)
        kind = "application/json" if waiting.status < 300 else PROBLEM
        received = len(waiting.body)
        return Answer(
            status=waiting.status,
            headers={"content-type": kind},
            body=waiting.body,
            sent=len(frame),
            received=received,
        )

    def _take_back(self, number: int, waiting: _Waiting) -> None:
        waiting.recalled = True
        waiting.done.set()
        with contextlib.suppress(PipeClosed):
            self._send(pack({"recall": number}))

    def _send(self, frame: bytes) -> None:
        with self._sending:
            if self._gone:
                raise PipeClosed(self._gone)
            try:
                self._sock.sendall(frame)
            except OSError as error:  # also when it takes too long: half a frame has no other end than this
                self._lost(f"The client that started this run is gone: {error}.")
                raise PipeClosed(self._gone) from error

    def _read(self) -> None:
        unpacker = Unpacker()
        try:
            while data := self._sock.recv(BLOCK):
                for header, body in unpacker.feed(data):
                    self._answered(header, body)
        except (OSError, e.InvalidMessage) as error:
            self._lost(f"The client that started this run is gone, or speaks another language: {error}")
        self._lost("The client that started this run is gone.")

    def _answered(self, header: Mapping[str, Any], body: bytes) -> None:
        number, status = header.get("id"), header.get("status")
        if not isinstance(number, int) or not isinstance(status, int) or not 100 <= status < 600:
            raise e.InvalidMessage(f"An answer has the header {json.dumps(header)[:200]}.")
        with self._lock:
            waiting = self._waiting.get(number)
        if waiting is not None and not waiting.recalled:  # else its deadline has passed
            waiting.status, waiting.body = status, body
            waiting.done.set()

    def _lost(self, why: str) -> None:
        with self._lock:
            self._gone = self._gone or why
            waiting = list(self._waiting.values())
        for one in waiting:
            one.done.set()


def pipe_of(descriptor: int) -> PipeTransport:
    """The transport over an inherited descriptor, which no child of this process will inherit."""
    os.set_inheritable(descriptor, False)
    return PipeTransport(socket.socket(fileno=descriptor))
