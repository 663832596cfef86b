"""What the contract tests share: a server on a real socket that answers whatever a test tells it to."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fieldlab_common import protocol as p

WAIT = 60.0  # seconds that a silent server is silent at most


class Exchange:
    """One request as it came, and the ways to answer it. The connection is closed when the play returns."""

    def __init__(self, stream: socket.socket, head: bytes, body: bytes, over: threading.Event) -> None:
        line, *fields = head.decode("latin-1").split("\r\n")
        self.method, self.target, _ = line.split(" ")
        self.headers = {k.strip().lower(): v.strip() for k, _, v in (one.partition(":") for one in fields)}
        self.body, self.socket, self._over = body, stream, over
        self.whole = False

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def answer(self, body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> None:
        """A whole answer."""
        fields = {"content-type": kind, "content-length": str(len(body)), **headers}
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items() if value)
        self.send(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body)
        self.whole = True

    def problem(self, code: str, status: int, **more: Any) -> None:
        """A problem document."""
        body = {"title": "T", "status": status, "code": code, "detail": "What happened.", "advice": "Do this.", **more}
        self.answer(json.dumps(body).encode(), p.PROBLEM, status)

    def silence(self) -> None:
        """Say nothing until the test is over."""
        self._over.wait(WAIT)

    def drip(self, data: bytes) -> None:
        """Send those bytes again and again, one at a time, until the other side has had enough."""
        try:
            while not self._over.wait(0.02):
                for byte in data:
                    self.send(bytes([byte]))
                    if self._over.wait(0.02):
                        return
        except OSError:
            return

    def reset(self) -> None:
        """End the connection with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


Play = Callable[[Exchange], None]


class Server:
    """It answers each request with the next play; the last one is repeated."""

    def __init__(self, *plays: Play, tls: ssl.SSLContext | None = None, slams: bool = False) -> None:
        self.plays, self.seen, self._tls = list(plays), list[Exchange](), tls
        self._slams = slams  # it resets every connection before it hears what is asked
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(WAIT)
        if self._slams:
            Exchange(connection, b"GET / HTTP/1.1", b"", self._over).reset()
            return
        try:
            stream = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
            with stream, stream.makefile("rb") as lines:
                while (exchange := self._read(stream, lines)) is not None:
                    self.seen.append(exchange)
                    play = self.plays.pop(0) if len(self.plays) > 1 else self.plays[0]
                    play(exchange)
                    if not exchange.whole:  # what follows on this connection would be misread
                        return
        except (OSError, ValueError):
            return  # the client went away, or did not like the certificate

    def _read(self, stream: socket.socket, lines: Any) -> Exchange | None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = lines.readline(65536)
            if not line:
                return None
            head += line
        length = next(
            (int(one.split(b":")[1]) for one in head.split(b"\r\n") if one.lower().startswith(b"content-length:")), 0
        )
        return Exchange(stream, head[:-4], lines.read(length), self._over)

    def close(self) -> None:
        """End everything."""
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for a connection
        self._listener.close()
        self._thread.join(WAIT)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """A function that starts a server with plays."""
    servers: list[Server] = []

    def start(*plays: Play, **options: Any) -> Server:
        servers.append(Server(*plays, **options))
        return servers[-1]

    yield start
    for server in servers:
        with contextlib.suppress(OSError):  # the test closed it itself
            server.close()
