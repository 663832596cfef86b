"""Requests to the director and its answers, without input or output; and the session that sends them.

``build`` makes a request from a row of ``protocol.ENDPOINTS``; ``parse`` makes a value of an answer, or raises one
typed error: every status, every content type and every damage that an answer can have ends in one of them. ``Session``
adds what takes time: deadlines, and retries of what is safe to retry. A ``Transport`` moves bytes and knows nothing
else (``fieldlab.http`` is the real one), so tests of all this need no network, and what they test is what runs.

A call is retried only when its endpoint is ``safe`` (asking twice does no more than asking once) or when nothing was
sent. How long: ``patience`` seconds, once this session has had an answer; before that, an endpoint where nothing
answers is most likely a wrong one, and the caller is told at once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from fieldlab_common import errors as e
from fieldlab_common import wire
from fieldlab_common.protocol import ENDPOINTS, PROBLEM, PROTOCOL, PROTOCOLS, Endpoint, Health, Problem

from fieldlab.text import clean, one_line

__all__ = ["Answer", "Request", "Session", "Settings", "Stream", "Transport", "build", "parse"]

T = TypeVar("T")
MAX_ANSWER = 64 * 1024 * 1024  # a longer JSON answer is refused: pages are bounded by the director far below that
MAX_RETRY_AFTER = 86_400.0  # seconds; who asks for more is not believed

_LATER = "Try again later; if it stays, tell the director's admin."
_BEFORE = "a proxy stands before a director that does not answer"
# What proxies say by themselves: a status is all there is to go by.
_BARE: Mapping[int, tuple[type[e.DirectorError], str, str]] = {
    401: (e.AuthenticationError, "something asks for authentication", ""),
    407: (e.DirectorUnreachable, "the proxy on the way asks who you are", "Check HTTPS_PROXY and its password."),
    413: (e.TooLarge, "a proxy on the way takes no body of that size", "Ask the director's admin to allow more."),
    429: (e.RateLimited, "a proxy on the way takes no more requests", _LATER),
    502: (e.Unavailable, _BEFORE, _LATER),
    503: (e.Unavailable, _BEFORE, _LATER),
    504: (e.Unavailable, _BEFORE, _LATER),
}


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request, complete: the transport adds nothing that has a meaning. ``timeout`` in seconds is for all of it."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    timeout: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back. Header names are lower-case."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Stream:
    """An answer whose body is read in chunks; each wait for a chunk has the request's timeout."""

    answer: Answer  # without body
    chunks: Iterator[bytes]


class Transport(Protocol):
    """Moves bytes. Raises ``DirectorUnreachable``, ``DirectorTimeout`` or ``BadAnswer`` and nothing else."""

    def send(self, request: Request) -> Answer:
        """Send it, and read the whole answer before the deadline."""
        ...

    def stream(self, request: Request) -> AbstractContextManager[Stream]:
        """Send it, and hand out the body as it comes."""
        ...

    def close(self) -> None:
        """Let go of all connections."""
        ...


# --- pure: requests and answers ---------------------------------------------------------------------------------------


def build(
    row: Endpoint,
    base: str,
    *,
    token: str | None = None,
    path: Mapping[str, str] | None = None,
    query: Mapping[str, object] | None = None,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    protocol: int = PROTOCOL,
) -> Request:
    """The request that asks ``row`` of the director at ``base``. Query entries that are None stay out.

    Raises:
        ConfigurationError: the token cannot be one.
    """
    names = {k: quote(v, safe="") for k, v in (path or {}).items()}
    url = base.rstrip("/") + row.path.format(**names)
    asked = {k: v for k, v in (query or {}).items() if v is not None}
    if asked:
        url += "?" + urlencode(asked)
    sent = {"accept": f"application/json, {PROBLEM}", "fieldlab-protocol": str(protocol)}
    sent["accept-encoding"] = "identity" if row.response is bytes else "gzip"  # a range is of what is stored
    sent.update(headers or {})
    if token:
        sent["authorization"] = f"Bearer {_sendable(token)}"
    data: bytes | None = None
    if row.request is bytes:
        data, sent["content-type"] = bytes(body) if isinstance(body, bytes | bytearray | memoryview) else b"", _BYTES
    elif row.request is not None:
        data, sent["content-type"] = wire.dumps(row.request() if body is None else body), "application/json"
    return Request(method=row.method, url=url, headers=sent, body=data, timeout=timeout)


_BYTES = "application/octet-stream"


def _sendable(token: str) -> str:
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise e.ConfigurationError(
            "The token has characters that no token has, such as a line break.",
            advice="Copy it again, without what stands around it.",
        )
    return token


def parse(row: Endpoint, answer: Answer, base: str) -> Any:
    """The value in ``answer``, as ``row`` documents it.

    Raises:
        DirectorError: the subclass that the problem document's ``code`` names, or one that describes the damage.
    """
    check(row, answer, base)
    if row.response is bytes:
        return answer.body
    kind = _content_type(answer)
    if kind != "application/json":
        raise _foreign(row, answer, base)
    try:
        return wire.loads(row.response, answer.body)
    except e.InvalidMessage as error:
        raise e.BadAnswer(
            f"The answer of {base} to {row.name!r} does not have the documented form: {clean(error.message)}",
            advice="Client and director are probably of different versions: compare `client.health()` with this one.",
            details={"endpoint": row.name},
        ) from error


def check(row: Endpoint, answer: Answer, base: str) -> None:
    """Raise the typed error of an answer that is not a success."""
    if answer.status == row.status or (row.response is bytes and answer.status == 206):
        return
    if 300 <= answer.status < 400:
        raise _redirected(answer, base)
    if _content_type(answer) == PROBLEM:
        raise _problem(row, answer, base)
    if answer.status in _BARE:
        cls, why, advice = _BARE[answer.status]
        said = f"{base} answered {answer.status} without a problem document: {why}. It said: {_excerpt(answer)}"
        raise _with(cls(said, advice=advice), answer)
    raise _foreign(row, answer, base)


def _content_type(answer: Answer) -> str:
    return answer.headers.get("content-type", "").partition(";")[0].strip().lower()


def _excerpt(answer: Answer) -> str:
    return one_line(answer.body[:400].decode("utf-8", "replace"), 120) or "(nothing)"


def _with(error: e.DirectorError, answer: Answer) -> e.DirectorError:
    error.http_status = answer.status
    error.request_id = answer.headers.get("x-request-id", error.request_id)
    wait = retry_after(answer.headers)
    if wait is not None:
        error.details["retry_after"] = wait
    return error


def _redirected(answer: Answer, base: str) -> e.DirectorError:
    target = one_line(answer.headers.get("location", "somewhere it does not say"), 200)
    return _with(
        e.BadAnswer(
            f"{base} answered with a redirect to {target}, which is not followed: a token goes to no other address.",
            advice="If that is the director, give its address as the endpoint; a log-in page is a proxy in the way.",
        ),
        answer,
    )


def _foreign(row: Endpoint, answer: Answer, base: str) -> e.DirectorError:
    kind = one_line(answer.headers.get("content-type", "no content type"))
    return _with(
        e.BadAnswer(
            f"What answers at {base} does not speak the director's protocol: status {answer.status}, {kind}, "
            f"beginning {_excerpt(answer)!r}.",
            advice="Check the endpoint, and whether a proxy stands between (HTTPS_PROXY, NO_PROXY).",
            details={"endpoint": row.name},
        ),
        answer,
    )


def _problem(row: Endpoint, answer: Answer, base: str) -> e.FieldlabError:
    try:
        problem = wire.loads(Problem, answer.body)
    except e.InvalidMessage:
        return _foreign(row, answer, base)
    cls = e.BY_CODE.get(problem.code)
    text = clean(problem.detail or problem.title, lines=True)
    if cls is None or not issubclass(cls, e.FieldlabError):
        cls, text = e.DirectorError, f"{text} (code {clean(problem.code)!r}, unknown to this version)"
    error = cls(text)
    error.advice = clean(problem.advice, lines=True) or cls.default_advice
    error.details.update({k: v for k, v in problem.details.items() if k != "sent"})  # that is for the transport to say
    if isinstance(error, e.DirectorError):
        error.request_id = problem.request_id
        _with(error, answer)
    return error


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a Retry-After header (RFC 9110, section 10.2.3): a number, or a date."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), MAX_RETRY_AFTER)


# --- the session ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Times in seconds. ``first``: patience before anything ever answered; ``patience``: afterwards."""

    timeout: float = 30.0
    first: float = 0.5
    patience: float = 20.0
    delay: float = 0.1
    longest_delay: float = 5.0


class Session:
    """The calls of one client to one director. Safe to use from several threads.

    ``login`` is what to do when the token has expired.
    """

    def __init__(
        self,
        base: str,
        token: str | None,
        transport: Transport,
        settings: Settings | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
        login: str = "",
    ) -> None:
        self.base, self._token, self._transport = base, token, transport
        self._login = login
        self.settings = settings or Settings()
        self._clock, self._sleep, self._jitter = clock, sleep, jitter
        self._answered = False
        self._protocol = PROTOCOL

    def call(
        self,
        name: str,
        response: type[T],
        *,
        path: Mapping[str, str] | None = None,
        query: Mapping[str, object] | None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        wait: float = 0.0,
        slow: float = 0.0,
        patience: float | None = None,
        safe: bool | None = None,
    ) -> T:
        """Ask the endpoint ``name`` and return its value, a ``response``.

        ``wait`` is how long the director may hold the request (a long-poll); it is added to the deadline and sent.
        ``slow``: seconds more than usual that the answer may take, because others are asked for it.
        ``safe`` overrides the table where a key in the message makes a second asking harmless.
        """
        row = ENDPOINTS[name]
        if wait:
            query = {**(query or {}), "wait": wait}

        def ask() -> Any:
            return self._once(
                row,
                build(
                    row,
                    self.base,
                    token=self._token,
                    path=path,
                    query=query,
                    body=body,
                    headers=headers,
                    timeout=self.settings.timeout + wait + slow,
                    protocol=self._protocol,
                ),
            )

        value = self._retrying(ask, safe=row.safe if safe is None else safe, patience=patience)
        assert isinstance(value, response)
        return value

    def stream(self, name: str, *, path: Mapping[str, str], offset: int = 0) -> AbstractContextManager[Stream]:
        """Ask an endpoint that answers bytes, from ``offset`` on. The caller resumes after a cut."""
        headers = {"range": f"bytes={offset}-"} if offset else {}
        row = ENDPOINTS[name]
        timeout, protocol = self.settings.timeout, self._protocol
        request = build(
            row, self.base, token=self._token, path=path, headers=headers, timeout=timeout, protocol=protocol
        )
        return self._transport.stream(request)

    def retrying(self, attempt: Callable[[], T], *, patience: float | None = None) -> T:
        """Run ``attempt``, which must be safe to repeat, with this session's patience."""
        return self._retrying(attempt, safe=True, patience=patience)

    def close(self) -> None:
        """Let go of all connections."""
        self._transport.close()

    def _once(self, row: Endpoint, request: Request) -> Any:
        answer = self._transport.send(request)
        self._answered = self._answered or answer.status < 500 or _content_type(answer) == PROBLEM
        try:
            return parse(row, answer, self.base)
        except e.AuthenticationError as error:
            if self._login and "expired" in error.details:
                error.advice = self._login
            raise
        except (e.BadAnswer, e.ProtocolMismatch) as error:
            again = row.safe or isinstance(error, e.ProtocolMismatch)  # refused: nothing was done
            if row.name != "health" and self._settle_protocol(error) and again:
                return parse(row, self._transport.send(_speaking(request, self._protocol)), self.base)
            raise

    def _settle_protocol(self, cause: e.DirectorError) -> bool:
        """Find out whether an answer could not be had, or read, for the version of the protocol that was spoken.

        True: there is a better one, which is spoken from now on. False: that was not it.

        Raises:
            ProtocolMismatch: director and client have none in common.
        """
        probe = ENDPOINTS["health"]
        try:
            health = parse(probe, self._transport.send(build(probe, self.base, timeout=5.0)), self.base)
        except e.FieldlabError:
            return False
        common = require_protocol(health, self.base, cause)
        was, self._protocol = self._protocol, common
        return was != common

    def _retrying(self, attempt: Callable[[], T], *, safe: bool, patience: float | None) -> T:
        limit = self.settings.patience if patience is None else patience
        began, tries = self._clock(), 0
        while True:
            try:
                return attempt()
            except e.FieldlabError as error:
                left = began + (limit if self._answered else min(limit, self.settings.first)) - self._clock()
                pause = self._pause(error, tries, safe)
                if pause is None or pause > left:
                    raise
            tries += 1
            self._sleep(pause)

    def _pause(self, error: e.FieldlabError, tries: int, safe: bool) -> float | None:
        """How long to wait before the next attempt; None: there is none."""
        transient = error.retryable or error.details.get("transient") is True
        if not transient or not (safe or error.details.get("sent") is False):
            return None
        asked = error.details.get("retry_after")
        if isinstance(asked, int | float):
            return float(asked)
        grown = min(self.settings.longest_delay, self.settings.delay * 2.0 ** min(tries, 16))
        return grown * (0.5 + 0.5 * self._jitter())


def require_protocol(health: Health, base: str, cause: Exception | None = None) -> int:
    """The newest version of the protocol that both the director and this client speak.

    Raises:
        ProtocolMismatch: there is none.
    """
    common = set(PROTOCOLS) & set(health.protocols)
    if common:
        return max(common)
    theirs, ours = (", ".join(map(str, sorted(some))) or "none" for some in (health.protocols, PROTOCOLS))
    newer = bool(health.protocols) and min(health.protocols) > max(PROTOCOLS)
    raise e.ProtocolMismatch(
        f"The director at {base} ({clean(health.version)}) speaks protocol {theirs}; this client speaks {ours}.",
        advice="Upgrade fieldlab here." if newer else "Ask the director's admin to upgrade it, or use an older client.",
    ) from cause


def _speaking(request: Request, protocol: int) -> Request:
    return replace(request, headers={**request.headers, "fieldlab-protocol": str(protocol)})


def is_loopback(base: str) -> bool:
    """Whether the address is this machine, which no proxy must stand before."""
    host = urlsplit(base).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def json_of(data: object) -> str:
    """Compact JSON; used where data of a user is sent, to find early what cannot be.

    Raises:
        ValueError, TypeError: as ``json.dumps`` does.
    """
    return json.dumps(data, allow_nan=False, separators=(",", ":"))
