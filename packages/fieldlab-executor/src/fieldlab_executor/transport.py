"""How bytes get to the director and back over HTTP, and what any way there has to be (``pipe``: that of a local run).

A ``Transport`` asks one row of ``protocol.ENDPOINTS`` and gives back status and body, or raises one of four errors:
``DirectorUnreachable``, ``DirectorTimeout``, ``BadAnswer``, and ``PipeClosed`` when nobody will ever answer again.
``interpret`` makes a value or a typed error of an answer, whoever gave it: the director, a proxy, a captive portal.

A transport may be used by several threads at once. HTTP keeps a connection for each request that is under way and
uses it again. Large bodies go from and to disk in chunks. Every wait has a deadline: ``timeout`` seconds for the answer
to begin and for each silence after that.

``http.client`` brings TLS and the e-mail package along, 6 MB of memory: it is imported where it is used, so that a
local run goes without.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol
from urllib.parse import quote, unquote, urlencode, urlsplit

from fieldlab_common import errors as e
from fieldlab_common.protocol import ENDPOINTS, PROBLEM, PROTOCOL, PROTOCOLS, Endpoint, Problem
from fieldlab_common.wire import loads

from fieldlab_executor.recall import Recall, Recalled

if TYPE_CHECKING:
    import http.client

__all__ = [
    "BLOCK",
    "Answer",
    "FileBody",
    "FileFault",
    "HttpTransport",
    "PipeClosed",
    "Sink",
    "Transport",
    "interpret",
    "proxy_for",
    "shut",
]

MAX_ANSWER = 64 * 1024 * 1024  # bytes of an answer that is kept in memory
HTTP_CHUNK = 256 * 1024 * 1024  # bytes of one upload request: its end syncs the disk, and a cut loses nothing
COMPRESSED_FROM = 1400  # bytes of a body: what fits one packet anyway goes as it is
BLOCK = 256 * 1024
_IDLE = 8  # connections that are kept for the next request
_CONNECT = 10.0  # seconds for a connection to be made

Sink = Callable[[int, bytes], object]  # takes a block of a body, and its offset in the whole


class PipeClosed(e.DirectorError):
    """The process that started this run is gone, and nobody else will ask for its results."""

    code: ClassVar[str] = "pipe_closed"


class FileFault(e.FieldlabError):
    """A file that was to be sent cannot be read, or is no longer as long as it was announced."""

    code: ClassVar[str] = "file_fault"


@dataclass(frozen=True, kw_only=True)
class FileBody:
    """Bytes ``offset`` to ``offset + size`` of a file, read as they are sent."""

    path: str
    offset: int
    size: int

    def blocks(self) -> Iterator[bytes]:
        """The bytes, block by block.

        Raises:
            FileFault: they are not there.
        """
        left = self.size
        try:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset)
                while left:
                    block = file.read(min(BLOCK, left))
                    if not block:
                        raise FileFault(f"{self.path} became shorter while it was sent.")
                    left -= len(block)
                    yield block
        except OSError as error:
            raise FileFault(f"{self.path} cannot be read: {error}.") from error


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back. Header names are lower-case. ``sent`` and ``received``: bytes on the line, headers included."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: int = 0
    received: int = 0


class Transport(Protocol):
    """Asks the director. ``chunk``: the most bytes that one upload should have."""

    chunk: int

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
        """Ask. With ``sink`` the body of a success goes there in blocks, from byte ``start`` on if the director can.

        Raises:
            Recalled: by ``recall``, which takes it back.
            DirectorUnreachable, DirectorTimeout, BadAnswer, PipeClosed, and FileFault of a ``FileBody``.
        """
        ...

    def close(self) -> None:
        """End every connection; what waits for an answer gets DirectorUnreachable at once."""
        ...


# --- answers ----------------------------------------------------------------------------------------------------------


def interpret(endpoint: str, answer: Answer) -> Any:
    """The value in an answer (bytes as they are), as ``ENDPOINTS`` documents it.

    Raises:
        DirectorError: the subclass that the problem document names, or one that describes the damage.
    """
    row = ENDPOINTS[endpoint]
    if 200 <= answer.status < 300:
        if row.response is bytes:
            return answer.body
        try:
            return loads(row.response, answer.body)
        except e.InvalidMessage as error:
            raise e.BadAnswer(
                f"The answer to {endpoint!r} is not of the documented form: {error.message}",
                advice="Something other than a director may stand at its address.",
            ) from error
    refusal = _problem(answer) or _foreign(endpoint, answer)
    refusal.http_status = answer.status
    if (after := answer.headers.get("retry-after", "")).isdigit():
        refusal.details.setdefault("retry_after", int(after))
    raise refusal


def _problem(answer: Answer) -> e.DirectorError | None:
    if answer.headers.get("content-type", "").partition(";")[0].strip().lower() != PROBLEM:
        return None
    try:
        problem = loads(Problem, answer.body)
    except e.InvalidMessage:
        return None
    found = e.BY_CODE.get(problem.code, e.DirectorError)
    cls = found if issubclass(found, e.DirectorError) else e.DirectorError
    error = cls(problem.detail or problem.title, advice=problem.advice, details=problem.details)
    error.request_id = problem.request_id
    return error


def _foreign(endpoint: str, answer: Answer) -> e.DirectorError:
    excerpt = " ".join(answer.body[:200].decode("utf-8", "replace").split())
    text = f"The answer to {endpoint!r} has status {answer.status} and no problem document: {excerpt!r}."
    cls: type[e.DirectorError] = e.BadAnswer
    if answer.status in (502, 503, 504):
        cls = e.Unavailable
    elif answer.status == 429:
        cls = e.RateLimited
    elif answer.status == 413:
        cls = e.TooLarge
    return cls(text, advice="A proxy may stand between this node and its director.")


# --- HTTP -------------------------------------------------------------------------------------------------------------


def proxy_for(url: str, environ: Mapping[str, str]) -> str | None:
    """The proxy that the environment names for ``url`` (``http_proxy``, ``https_proxy``, ``no_proxy``), if any.

    This machine itself is never asked through a proxy.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if host in ("localhost", "::1") or host.startswith("127."):
        return None
    # Only lower case for http: HTTP_PROXY can be set by a remote client of a CGI program (CVE-2016-5385).
    names = ["https_proxy", "HTTPS_PROXY"] if parts.scheme == "https" else ["http_proxy"]
    proxy = next((environ[name] for name in [*names, "all_proxy", "ALL_PROXY"] if environ.get(name)), None)
    without = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    for entry in (one.strip().lower().lstrip(".") for one in without.split(",")):
        name, _, port = entry.partition(":") if entry.count(":") == 1 else (entry, "", "")
        if name == "*" or (name and (host == name or host.endswith("." + name)) and port in ("", str(parts.port))):
            return None
    return proxy


class HttpTransport:
    """HTTP/1.1 to the director at ``url``, as the bearer of ``token``.

    ``ca``: the PEM text of certificates to trust instead of the system's, or its file. ``proxy``: ``http://[user:password@]host:port``.
    """

    def __init__(self, url: str, token: str, *, ca: str | None = None, proxy: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise e.ConfigurationError(f"The director's address {url!r} is not an http(s) URL.")
        self.chunk = HTTP_CHUNK
        self._secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if self._secure else 80)
        self._prefix = parts.path.rstrip("/")
        self._where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._headers = {"Authorization": f"Bearer {token}", "Fieldlab-Protocol": str(PROTOCOL)}
        self._proxy = urlsplit(proxy if "://" in proxy else "http://" + proxy) if proxy else None
        self._context = _tls(ca) if self._secure else None
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False
        self._compressing = True

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
        """Ask over a connection that is free, or a new one. A longer body of bytes goes compressed."""
        row = ENDPOINTS[endpoint]
        target = self._prefix + row.path.format(**{k: quote(v, safe="") for k, v in (path or {}).items()})
        if query:
            target += "?" + urlencode(query)
        ask = functools.partial(self._ask, row, target, body, _Wanted(timeout, start, sink, recall))
        answer = ask()
        if answer.status == e.ProtocolMismatch.status and self._settle(answer):
            return ask()
        return answer

    def _settle(self, answer: Answer) -> bool:
        """Go on in the newest version of the protocol that the director speaks too; False: there is no other."""
        refusal = _problem(answer)
        theirs = refusal.details.get("protocols") if isinstance(refusal, e.ProtocolMismatch) else None
        common = set(PROTOCOLS) & set(theirs) if isinstance(theirs, list | tuple) else set()
        spoken = str(max(common, default=""))
        if not common or self._headers["Fieldlab-Protocol"] == spoken:
            return False
        self._headers = {**self._headers, "Fieldlab-Protocol": spoken}
        return True

    def _ask(self, row: Endpoint, target: str, body: bytes | FileBody | None, wanted: _Wanted) -> Answer:
        headers = dict(self._headers)
        if wanted.start:
            headers["Range"] = f"bytes={wanted.start}-"
        if body is None:
            return self._exchange(row.method, target, headers, None, wanted)
        headers["Content-Type"] = "application/octet-stream" if row.request is bytes else "application/json"
        headers["Content-Length"] = str(body.size if isinstance(body, FileBody) else len(body))
        if isinstance(body, bytes) and len(body) >= COMPRESSED_FROM and self._compressing:
            small = zlib.compress(body, 1, wbits=31)  # the fastest level, which the node's processor hardly notices
            encoded = {**headers, "Content-Encoding": "gzip", "Content-Length": str(len(small))}
            answer = self._exchange(row.method, target, encoded, small, wanted)
            if answer.status != 415:
                return answer
            self._compressing = False  # somebody on the way does not take it (RFC 9110, section 15.5.16)
        return self._exchange(row.method, target, headers, body, wanted)

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = [connection.sock for connection in self._busy]
        for connection in idle:
            connection.close()
        for sock in busy:
            if sock is not None:
                shut(sock)

    def _exchange(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | FileBody | None,
        wanted: _Wanted,
    ) -> Answer:
        response = None
        while response is None:
            connection, used = self._connection(wanted.timeout)
            keep = False
            try:
                with _Converted(self._where, wanted):
                    response = self._send(connection, method, target, headers, body, wanted)
                    answer = _receive(response, wanted.sink, wanted.start, wanted.timeout)
                    keep = not response.will_close
            except e.DirectorUnreachable:
                # A connection that was closed while it was idle says nothing about the director now.
                if response is not None or not used or self._closed:
                    raise
            finally:
                if wanted.recall is not None:
                    wanted.recall.disarm(connection)
                self._give_back(connection, keep=keep)
        sent = len(method) + len(target) + 12 + sum(len(k) + len(v) + 4 for k, v in headers.items())
        return replace(answer, sent=sent + int(headers.get("Content-Length", 0)))

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes | FileBody | None,
        wanted: _Wanted,
    ) -> http.client.HTTPResponse:
        if self._proxy is not None and not self._secure:
            target = self._where + target
            headers = {**headers, **_proxy_headers(self._proxy)}
        data = body.blocks() if isinstance(body, FileBody) else body
        if connection.sock is None:
            connection.connect()
        sock = connection.sock
        sock.settimeout(wanted.timeout)
        if wanted.recall is not None:
            wanted.recall.arm(connection, lambda: shut(sock))
        try:
            connection.request(method, target, body=data, headers=dict(headers))
        except (BrokenPipeError, ConnectionResetError):
            if connection.sock is None or body is None:
                raise
            # The body was not wanted to its end; the answer that says why may be there.
        return connection.getresponse()

    def _connection(self, timeout: float) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            if self._closed:
                raise e.DirectorUnreachable("The link is closed.")
            connection = self._idle.pop() if self._idle else None
            used = connection is not None
            if connection is None:
                connection = self._make(min(timeout, _CONNECT))
            self._busy.add(connection)
            return connection, used

    def _make(self, timeout: float) -> http.client.HTTPConnection:
        import http.client

        host, port = self._host, self._port
        if self._proxy is not None:
            host, port = self._proxy.hostname or "", self._proxy.port or 8080
        if not self._secure:
            return http.client.HTTPConnection(host, port, timeout=timeout, blocksize=BLOCK)
        made = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context, blocksize=BLOCK)
        if self._proxy is not None:
            made.set_tunnel(self._host, self._port, headers=_proxy_headers(self._proxy))
        return made

    def _give_back(self, connection: http.client.HTTPConnection, *, keep: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if keep and not self._closed and len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()


class _Wanted(NamedTuple):
    """What ``Transport.request`` is told besides what to ask."""

    timeout: float
    start: int
    sink: Sink | None
    recall: Recall | None


class _Converted:
    """Turns what the standard library raises into the errors of a transport, keeping the cause."""

    def __init__(self, where: str, wanted: _Wanted) -> None:
        self._where, self._timeout, self._recall = where, wanted.timeout, wanted.recall

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import http.client

        if self._recall is not None and self._recall.done and isinstance(error, Exception):
            raise Recalled from error
        if isinstance(error, TimeoutError) and not isinstance(error, e.FieldlabError):
            raise e.DirectorTimeout(f"{self._where} did not answer within {self._timeout:g} s.") from error
        if isinstance(error, OSError) and not isinstance(error, e.FieldlabError):
            raise e.DirectorUnreachable(
                f"{self._where} does not answer: {str(error) or type(error).__name__}."
            ) from error
        if isinstance(error, http.client.HTTPException):
            name = type(error).__name__
            raise e.BadAnswer(f"What {self._where} answered is not whole HTTP: {name} {error}.") from error


def _receive(response: http.client.HTTPResponse, sink: Sink | None, start: int, timeout: float) -> Answer:
    import http.client

    headers = {name.lower(): value for name, value in response.getheaders()}
    received = 15 + sum(len(k) + len(v) + 4 for k, v in headers.items())
    kept: list[bytes] = []
    wanted = sink is not None and response.status in (200, 206)
    offset = start if response.status == 206 else 0
    deadline = time.monotonic() + timeout
    size = 0
    while block := response.read1(BLOCK):
        size += len(block)
        if wanted and sink is not None:
            sink(offset + size - len(block), block)
            continue
        kept.append(block)
        if size > MAX_ANSWER:
            raise e.BadAnswer(f"An answer is longer than {MAX_ANSWER} bytes.")
        if time.monotonic() > deadline:
            raise TimeoutError
    if response.length:  # read1 does not say that a body was cut
        raise http.client.IncompleteRead(b"", response.length)
    response.close()  # nor does it (before Python 3.12) leave the connection ready for the next request
    return Answer(status=response.status, headers=headers, body=b"".join(kept), received=received + size)


def _tls(ca: str | None) -> Any:
    import ssl

    try:
        if ca is not None and "-----BEGIN" in ca:
            return ssl.create_default_context(cadata=ca)
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise e.ConfigurationError(f"The certificates in {(ca or '')[:80]!r} cannot be used: {error}.") from error


def _proxy_headers(proxy: Any) -> dict[str, str]:
    if proxy.username is None:
        return {}
    import base64

    user = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()}


def shut(sock: socket.socket) -> None:
    """End both directions of a connection, whoever waits on it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # it was not connected any more
        return
