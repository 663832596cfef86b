"""What stands between the network and ``http``: deadlines for slow senders, headers that browsers heed, proxies.

A request's head must be here within ``Limits.head_seconds``, however slowly it trickles in, and within
``Limits.head_bytes``; ``http`` holds bodies to a pace. Where a request came from is what the connection says, unless a
proxy that is named as such says it better.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

import h11
import msgspec
import uvicorn
from fieldlab_common.protocol import PROBLEM, Problem
from uvicorn.protocols.http.h11_impl import H11Protocol

from fieldlab_director.settings import Settings

__all__ = ["Hardened", "server_config"]

KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection: one that is closed first can lose a request

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_SAFE = {
    b"x-content-type-options": b"nosniff",  # what it is is what the content type says
    b"cache-control": b"no-store",  # answers are one user's: no proxy and no browser keeps them
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",  # shown in a browser, it does nothing
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
}
_STRICT = (b"strict-transport-security", b"max-age=31536000")


class Hardened:
    """An ASGI application whose every answer has the headers that browsers heed, unless it has others of the name."""

    def __init__(self, app: App, *, tls: bool) -> None:
        self._app = app
        self._headers = [*_SAFE.items(), *([_STRICT] if tls else [])]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = self._with_ours(message["headers"])
            await send(message)

        await self._app(scope, receive, sending)

    def _with_ours(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        found = list(headers)
        names = {name for name, _ in found}
        return found + [(name, value) for name, value in self._headers if name not in names]


def server_config(app: App, settings: Settings) -> uvicorn.Config:
    """How uvicorn is to serve ``app``."""
    limits = settings.limits
    return uvicorn.Config(
        Hardened(app, tls=settings.certificate is not None),
        http=_with_deadline(limits.head_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.stop_after),
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
        proxy_headers=settings.behind_proxy,
        forwarded_allow_ips=list(settings.proxies),
        h11_max_incomplete_event_size=limits.head_bytes,
    )


def _with_deadline(seconds: float) -> type[asyncio.Protocol]:
    return type("Protocol", (_Protocol,), {"head_seconds": seconds})


class _Protocol(H11Protocol):
    """uvicorn's, with a deadline for the head of each request, and problem documents for what is no request."""

    head_seconds: float
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Somebody dialled: the head of a request is due."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Something came: all of a head, or the deadline stands from its first byte on."""
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is over."""
        self._settle()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or has too long a head."""
        problem = Problem(title="This is no HTTP request.", status=400, code="invalid_request", detail=msg)
        body = msgspec.json.encode(problem)
        headers = [(b"content-type", PROBLEM.encode()), (b"content-length", str(len(body)).encode())]
        answer = h11.Response(status_code=400, headers=[*headers, (b"connection", b"close")], reason=b"Bad Request")
        for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._settle()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _settle(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
