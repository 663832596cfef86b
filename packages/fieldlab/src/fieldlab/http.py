"""The transport over HTTP: httpx2, imported when the first request is sent.

Every way in which sending can fail becomes one of a few errors here, which says what to do. What httpx2 raised is kept
as the error's ``__context__``, and not printed with it: it is long, and says nothing to who uses fieldlab. The
deadline is for the whole exchange, not for each read (``sockets``); of an answer that is read in chunks, for the
headers and then for each chunk. Bodies are decoded here, and not by httpx2, because ours are bounded: a few bytes of
gzip may say gigabytes.

Safe to use from several threads; the child of a fork makes connections of its own.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fieldlab_common import errors as e

from fieldlab.forks import made_anew
from fieldlab.text import clean
from fieldlab.transport import MAX_ANSWER, Answer, Request, Stream, is_loopback

if TYPE_CHECKING:
    import ssl

    import httpx2

    from fieldlab.sockets import Deadline

__all__ = ["HttpTransport"]

CONNECT_TIMEOUT = 5.0
MAX_CONNECTIONS = 64  # requests at a time; one that is held (a long-poll) has its connection for as long
MAX_REFUSAL = 1024 * 1024  # bytes that are read of what comes in place of a file
_CHUNK = 256 * 1024


class HttpTransport:
    """One pool of connections to one director."""

    def __init__(self, base: str, *, ca: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._base, self._ca, self._clock = base, ca, clock
        self.after_fork()
        made_anew(self)

    def after_fork(self) -> None:
        """Begin without connections."""
        self._lock = threading.Lock()
        self._open: tuple[httpx2.Client, Deadline] | None = None

    def send(self, request: Request) -> Answer:
        """Send it, and read the whole answer before the deadline."""
        with self._exchange(request) as (response, _):
            body = self._gather(response, request, MAX_ANSWER)
            return Answer(status=response.status_code, headers=_headers(response), body=body)

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        """Send it, and hand out the body as it comes."""
        with self._exchange(request) as (response, deadline):
            head = Answer(status=response.status_code, headers=_headers(response))
            if response.status_code >= 300:
                body = self._gather(response, request, MAX_REFUSAL)
                yield Stream(Answer(status=head.status, headers=head.headers, body=body), iter(()))
            else:
                yield Stream(head, _in_time(response.iter_raw(), request.timeout, deadline))

    def close(self) -> None:
        """Let go of all connections."""
        with self._lock:
            was, self._open = self._open, None
        if was is not None:
            was[0].close()

    def _gather(self, response: httpx2.Response, request: Request, most: int) -> bytes:
        parts: list[bytes] = []
        total = 0
        for chunk in self._decoded(response):
            parts.append(chunk)
            total += len(chunk)
            if total > most:
                raise e.BadAnswer(
                    f"{self._base} answered more than {most} bytes to {_asked(self._base, request)}.",
                    advice="Check that the endpoint is a director's.",
                )
        return b"".join(parts)

    def _decoded(self, response: httpx2.Response) -> Iterator[bytes]:
        coding = response.headers.get("content-encoding", "").strip().lower()
        if coding in ("", "identity"):
            return response.iter_raw()
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise _undecodable(self._base, f"is encoded as {clean(coding)!r}, which was not asked for")
        return _inflated(response.iter_raw(), self._base)

    @contextmanager
    def _exchange(self, request: Request) -> Iterator[tuple[httpx2.Response, Deadline]]:
        client, deadline = self._client()
        import httpx2

        timeout = httpx2.Timeout(request.timeout, connect=min(CONNECT_TIMEOUT, request.timeout))
        was = deadline.timeout, deadline.until
        deadline.begin(request.timeout)
        try:
            with client.stream(
                request.method, request.url, headers=dict(request.headers), content=request.body, timeout=timeout
            ) as response:
                yield response, deadline
        except httpx2.HTTPError as error:
            raise _converted(self._base, request, error) from None
        except httpx2.InvalidURL as error:
            raise e.ConfigurationError(f"{self._base!r} is not usable as an endpoint: {clean(error)}.") from None
        finally:
            deadline.timeout, deadline.until = was

    def _client(self) -> tuple[httpx2.Client, Deadline]:
        with self._lock:
            if self._open is None:
                self._open = self._connected()
            return self._open

    def _connected(self) -> tuple[httpx2.Client, Deadline]:
        import httpx2

        from fieldlab.sockets import Deadline, keep

        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=16, keepalive_expiry=20.0)
        context: bool | ssl.SSLContext = self._base.startswith("https:")  # else the system's CAs need not be read
        if context and self._ca is not None:
            context = _context(self._ca)
        own = is_loopback(self._base)
        try:
            client = httpx2.Client(follow_redirects=False, verify=context, trust_env=not own, limits=limits)
        except (ValueError, ImportError, OSError) as error:
            raise e.ConfigurationError(
                f"The connection to {self._base} cannot be set up: {clean(error)}",
                advice="Check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY, NO_PROXY and SSL_CERT_FILE.",
            ) from error
        deadline = Deadline(self._clock)
        keep(client, deadline)
        return client, deadline


def _context(ca: str) -> ssl.SSLContext:
    import ssl

    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise e.ConfigurationError(
            f"The CA file {ca!r} cannot be read: {error}.", advice="Give the path of a PEM file with certificates."
        ) from error


# --- bodies -----------------------------------------------------------------------------------------------------------


def _in_time(chunks: Iterator[bytes], timeout: float, deadline: Deadline) -> Iterator[bytes]:
    """The chunks, each within ``timeout``; between them the thread's deadline is what it was."""
    while True:
        was = deadline.timeout, deadline.until
        deadline.begin(timeout)
        try:
            chunk = next(chunks, None)
        finally:
            deadline.timeout, deadline.until = was
        if chunk is None:
            return
        yield chunk


def _inflated(chunks: Iterable[bytes], base: str) -> Iterator[bytes]:
    """What was deflated (RFC 1950 to 1952), in pieces of bounded size."""
    machine = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: zlib finds out whether its header or gzip's is there
    try:
        for chunk in chunks:
            rest = chunk
            while rest:
                yield machine.decompress(rest, _CHUNK)
                rest = machine.unconsumed_tail
    except zlib.error as error:
        raise _undecodable(base, f"is not encoded as it says: {clean(error)}") from error
    if not machine.eof:
        raise _cut(base, "its compressed body ends too early")


def _headers(response: httpx2.Response) -> dict[str, str]:
    return {k.lower(): v for k, v in response.headers.items()}


# --- errors -----------------------------------------------------------------------------------------------------------


def _converted(base: str, request: Request, error: httpx2.HTTPError) -> e.FieldlabError:
    """What a failure to send or to receive is called here."""
    import httpx2

    if (failed := _tls_failure(error)) is not None:
        return _refused_tls(base, failed)
    if isinstance(error, httpx2.ConnectTimeout | httpx2.ConnectError):
        return _unreachable(base, error, sent=False)
    if isinstance(error, httpx2.ProxyError):
        return _proxied(base, error)
    if isinstance(error, httpx2.TimeoutException):
        return _late(base, request)
    if isinstance(error, httpx2.RemoteProtocolError):
        return _malformed(base, error)
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return e.ConfigurationError(f"{base!r} is not usable as an endpoint: {clean(error)}.")
    return _unreachable(base, error, sent=True)


def _unreachable(base: str, error: Exception, *, sent: bool) -> e.DirectorUnreachable:
    why = clean(error).rstrip(".") or type(error).__name__
    proxy = _proxy_of(base)
    through = f" through the proxy {proxy} (HTTPS_PROXY; NO_PROXY names who is reached without)" if proxy else ""
    return e.DirectorUnreachable(
        f"No director answers at {base}{through}: {why}." if not sent else f"The connection to {base} broke: {why}.",
        advice="Check that it runs, and the endpoint (argument endpoint=, FIELDLAB_ENDPOINT, or the profile).",
        details={"sent": sent},
    )


def _proxy_of(base: str) -> str:
    """The proxy that the environment names for ``base``, without user and password; empty: none."""
    from urllib.request import getproxies, proxy_bypass

    where = urlsplit(base)
    found = getproxies()
    named = found.get(where.scheme) or found.get("all") or ""
    if not named or is_loopback(base) or proxy_bypass(where.netloc):
        return ""
    return clean(named.rpartition("@")[2])


def _proxied(base: str, error: Exception) -> e.DirectorUnreachable:
    return e.DirectorUnreachable(
        f"The proxy before {base} refused the connection: {clean(error).rstrip('.') or 'it did not say why'}.",
        advice="Check HTTPS_PROXY and its password; NO_PROXY names hosts that are to be reached without it.",
        details={"sent": False},
    )


def _asked(base: str, request: Request) -> str:
    return f"{request.method} {request.url.removeprefix(base)}"


def _late(base: str, request: Request) -> e.DirectorTimeout:
    return e.DirectorTimeout(
        f"{base} did not answer {_asked(base, request)} within {request.timeout:g} s.",
        advice="Try again, or give the client a longer timeout=.",
    )


def _malformed(base: str, error: Exception) -> e.DirectorError:
    text = clean(error).rstrip(".")
    if "without sending a response" in text:
        return _unreachable(base, error, sent=True)
    made = _cut(base, text)
    if text == "illegal request line":  # h11's word for bytes that no text begins with, such as a TLS alert
        made.advice = "If it speaks TLS, give the endpoint as https://."
    return made


def _undecodable(base: str, how: str) -> e.BadAnswer:
    return e.BadAnswer(f"The answer of {base} {how}.", advice="Something on the way damages answers: look for a proxy.")


def _cut(base: str, how: str) -> e.BadAnswer:
    return e.BadAnswer(
        f"The answer of {base} was cut or malformed: {how}.",
        advice="Try again; if it stays, something between here and the director damages answers.",
        details={"transient": True},
    )


def _tls_failure(error: BaseException | None) -> ssl.SSLError | None:
    import ssl

    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError) else None


_GET_CA = (
    "If that is right, get the file with the director's CA from its admin and give it: Client(ca=...), or `ca` in the "
    "profile. If not, something between here and the director opens what is sent."
)
# OpenSSL's verification results (x509_vfy.h), in words, and what to do
_VERDICTS = {
    9: ("is not valid yet", "Compare this machine's clock with the right time."),
    10: ("has expired", "Compare this machine's clock with the right time; if it is right, tell the director's admin."),
    18: ("is signed by itself, and not one that this machine trusts", _GET_CA),
    19: ("is signed by an authority that this machine does not know", _GET_CA),
    20: ("is signed by an authority that this machine does not know", _GET_CA),
    21: ("is signed by an authority that this machine does not know", _GET_CA),
    62: ("is for another name", "Give the endpoint with a name that is in the certificate."),
    64: ("is for another address", "Give the endpoint with a name that is in the certificate."),
}


def _refused_tls(base: str, error: ssl.SSLError) -> e.CertificateRefused:
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        said, advice = _VERDICTS.get(error.verify_code, (f"is refused: {clean(error.verify_message)}", _GET_CA))
        return e.CertificateRefused(f"The certificate of {base} {said}.", advice=advice, details={"sent": False})
    reason = clean(error.reason or error)
    advice = "Check that the endpoint speaks TLS; if it does not, it is http://." if "VERSION" in reason else ""
    return e.CertificateRefused(f"No TLS with {base}: {reason}.", advice=advice, details={"sent": False})
