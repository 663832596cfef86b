"""The transport over HTTP: httpx2, imported when the first request is sent.

Every way in which sending can fail becomes one of three errors here, with its cause kept. The deadline is for the whole
exchange, not for each read: a server that sends a byte a second is as late as one that is silent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fieldlab_common import errors as e

from fieldlab.text import clean
from fieldlab.transport import MAX_ANSWER, Answer, Request, Stream, is_loopback

if TYPE_CHECKING:
    import httpx2

__all__ = ["HttpTransport"]

CONNECT_TIMEOUT = 5.0


class HttpTransport:
    """One pool of connections to one director."""

    def __init__(self, base: str, *, ca: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._base, self._ca, self._clock = base, ca, clock
        self._lock = threading.Lock()
        self._pool: httpx2.Client | None = None

    def send(self, request: Request) -> Answer:
        """Send it, and read the whole answer before the deadline."""
        deadline = self._clock() + request.timeout
        with self._exchange(request) as response:
            parts: list[bytes] = []
            total = 0
            for chunk in response.iter_bytes():
                parts.append(chunk)
                total += len(chunk)
                if total > MAX_ANSWER:
                    raise e.BadAnswer(f"{self._base} answered more than {MAX_ANSWER} bytes to {request.url}.")
                if self._clock() > deadline:
                    raise _late(self._base, request)
            return Answer(status=response.status_code, headers=_headers(response), body=b"".join(parts))

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        """Send it, and hand out the body as it comes."""
        with self._exchange(request) as response:
            head = Answer(status=response.status_code, headers=_headers(response))
            if response.status_code >= 300:
                head = Answer(status=head.status, headers=head.headers, body=response.read()[:MAX_ANSWER])
                yield Stream(head, iter(()))
            else:
                yield Stream(head, response.iter_raw(1 << 18))

    def close(self) -> None:
        """Let go of all connections."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    @contextmanager
    def _exchange(self, request: Request) -> Iterator[httpx2.Response]:
        import httpx2

        timeout = httpx2.Timeout(request.timeout, connect=min(CONNECT_TIMEOUT, request.timeout))
        try:
            with self._client().stream(
                request.method, request.url, headers=dict(request.headers), content=request.body, timeout=timeout
            ) as response:
                yield response
        except (httpx2.ConnectTimeout, httpx2.ConnectError, httpx2.ProxyError) as error:
            raise _unreachable(self._base, error, sent=False) from error
        except httpx2.TimeoutException as error:
            raise _late(self._base, request) from error
        except httpx2.RemoteProtocolError as error:
            raise _cut(self._base, error) from error
        except httpx2.DecodingError as error:
            raise e.BadAnswer(f"The answer of {self._base} is not encoded as it says: {clean(error)}.") from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.LocalProtocolError) as error:
            raise e.ConfigurationError(f"{self._base!r} is not usable as an endpoint: {clean(error)}.") from error
        except httpx2.TransportError as error:
            raise _unreachable(self._base, error, sent=True) from error

    def _client(self) -> httpx2.Client:
        import httpx2

        with self._lock:
            if self._pool is None:
                verify: object = True if self._ca is None else _context(self._ca)
                self._pool = httpx2.Client(
                    follow_redirects=False,
                    verify=verify,  # type: ignore[arg-type]
                    trust_env=not is_loopback(self._base),
                    limits=httpx2.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=20.0),
                )
            return self._pool


def _context(ca: str) -> object:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise e.ConfigurationError(f"The CA file {ca!r} cannot be read: {error}.") from error


def _headers(response: httpx2.Response) -> dict[str, str]:
    return {k.lower(): v for k, v in response.headers.items()}


def _unreachable(base: str, error: Exception, *, sent: bool) -> e.DirectorUnreachable:
    why = clean(error).rstrip(".") or type(error).__name__
    return e.DirectorUnreachable(
        f"No director answers at {base}: {why}." if not sent else f"The connection to {base} broke: {why}.",
        advice="Check that it runs, and the endpoint (argument endpoint=, FIELDLAB_ENDPOINT, or the profile).",
        details={"sent": sent},
    )


def _late(base: str, request: Request) -> e.DirectorTimeout:
    return e.DirectorTimeout(
        f"{base} did not answer {request.method} {request.url.removeprefix(base)} within {request.timeout:g} s.",
        advice="Try again, or give the client a longer timeout=.",
    )


def _cut(base: str, error: Exception) -> e.DirectorError:
    text = clean(error).rstrip(".")
    if "without sending a response" in text:
        return _unreachable(base, error, sent=True)
    return e.BadAnswer(
        f"The answer of {base} was cut or malformed: {text}.",
        advice="Try again; if it stays, something between here and the director damages answers.",
        details={"transient": True},
    )
