"""Both ways to the director: over real sockets, with every damage that an answer can have."""

import contextlib
import datetime
import ipaddress
import json
import os
import queue
import socket
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fieldlab_common import errors as e
from fieldlab_common.protocol import PROBLEM, BlobStatus, Poll
from fieldlab_executor import transport
from fieldlab_executor.frames import Unpacker, pack
from fieldlab_executor.pipe import PipeTransport, pipe_of
from fieldlab_executor.recall import Recall, Recalled
from fieldlab_executor.transport import (
    Answer,
    FileBody,
    FileFault,
    HttpTransport,
    PipeClosed,
    interpret,
    proxy_for,
)

DEADLINE = 20.0
PROBLEM_BODY = b'{"title": "t", "status": 409, "code": "claim_refused", "detail": "held", "request_id": "r1"}'


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Server:
    """A server in a thread that answers each request with the next script: bytes for the socket, then closed or not."""

    def __init__(self, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self.requests: queue.Queue[tuple[bytes, bytes]] = queue.Queue()
        self.scripts: queue.Queue[tuple[bytes, bool]] = queue.Queue()
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def answer(self, status: str, body: bytes = b"", kind: str = "application/json", extra: str = "") -> None:
        head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        self.raw(head.encode() + body)

    def raw(self, data: bytes, *, close: bool = False) -> None:
        self.scripts.put((data, close))

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            file = stack.enter_context(stack.enter_context(connection).makefile("rb"))
            while line := file.readline():
                head, length = line, 0
                while (line := file.readline()) not in (b"\r\n", b""):
                    head += line
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                self.requests.put((head, file.read(length)))
                data, close = self.scripts.get(timeout=DEADLINE)
                connection.sendall(data)
                if close:
                    connection.shutdown(socket.SHUT_RDWR)
                    return

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        for connection in self._open:
            self.scripts.put((b"", True))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def http_(server: Server) -> Iterator[HttpTransport]:
    made = HttpTransport(f"http://127.0.0.1:{server.port}/prefix/", "secret")
    yield made
    made.close()


def poll(transport: HttpTransport | PipeTransport, timeout: float = DEADLINE) -> Answer:
    return transport.request("poll", query={"after": 3, "wait": 0.5, "journal": "j"}, timeout=timeout)


def test_a_request_is_what_the_table_says(server: Server, http_: HttpTransport) -> None:
    server.answer("200 OK", b'{"cursor": 7}')
    assert interpret("poll", poll(http_)) == Poll(cursor=7)
    head, _ = server.requests.get()
    assert head.startswith(b"GET /prefix/v1/executor/poll?after=3&wait=0.5&journal=j HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in head
    assert b"Fieldlab-Protocol: 1\r\n" in head


def test_a_body_is_sent_with_its_type_and_counted(server: Server, http_: HttpTransport) -> None:
    server.answer("200 OK", b'{"acked": 1}')
    answer = http_.request("report", query={"lane": "control"}, body=b"x" * 1000, timeout=DEADLINE)
    head, body = server.requests.get()
    assert body == b"x" * 1000
    assert b"Content-Type: application/octet-stream\r\n" in head
    assert 1000 < answer.sent < 1500
    assert 12 < answer.received < 200


def test_a_long_body_goes_compressed(server: Server, http_: HttpTransport) -> None:
    server.answer("200 OK", b'{"acked": 1}')
    answer = http_.request("report", query={"lane": "bulk"}, body=b"line\n" * 10_000, timeout=DEADLINE)
    head, body = server.requests.get()
    assert b"Content-Encoding: gzip\r\n" in head
    assert zlib.decompress(body, 31) == b"line\n" * 10_000
    assert answer.sent < 1500


def test_where_compression_is_refused_it_is_done_without_from_then_on(server: Server, http_: HttpTransport) -> None:
    server.answer("415 Unsupported Media Type", b"<html>proxy</html>", "text/html")
    for _ in range(2):
        server.answer("200 OK", b'{"acked": 1}')
        answer = http_.request("report", query={"lane": "bulk"}, body=b"line\n" * 10_000, timeout=DEADLINE)
        assert answer.status == 200
    encoded, *plain = [server.requests.get() for _ in range(3)]
    assert b"Content-Encoding" in encoded[0]
    assert [(b"Content-Encoding" in head, len(body)) for head, body in plain] == [(False, 50_000)] * 2


def test_an_older_director_is_spoken_to_in_its_version(
    server: Server, http_: HttpTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PROTOCOLS", (0, 1))
    for protocols in ([0], [7]):
        refusal = {"title": "t", "status": 426, "code": "protocol_mismatch", "details": {"protocols": protocols}}
        server.answer("426 Upgrade Required", json.dumps(refusal).encode(), PROBLEM)
        if protocols == [0]:
            server.answer("200 OK", b'{"cursor": 7}')
            assert interpret("poll", poll(http_)) == Poll(cursor=7)
        else:
            with pytest.raises(e.ProtocolMismatch):
                interpret("poll", poll(http_))
    spoken = [server.requests.get()[0].partition(b"Fieldlab-Protocol: ")[2][:1] for _ in range(3)]
    assert spoken == [b"1", b"0", b"0"]


def test_a_connection_is_used_again(server: Server, http_: HttpTransport) -> None:
    for _ in range(3):
        server.answer("200 OK", b"{}")
        poll(http_)
    assert server.connections == 1


def test_one_that_was_closed_while_idle_is_replaced_unseen(server: Server, http_: HttpTransport) -> None:
    server.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", close=True)
    poll(http_)
    server.answer("200 OK", b'{"cursor": 1}')
    assert interpret("poll", poll(http_)).cursor == 1
    assert server.connections == 2


def test_a_request_that_is_taken_back_ends_at_once_and_nothing_of_it_crosses_the_line_any_more(
    server: Server, http_: HttpTransport
) -> None:
    server.answer("200 OK", b"{}")
    poll(http_)  # over a connection that is used again, whose end by itself would be replaced unseen
    recall = Recall()
    threading.Thread(target=lambda: [server.requests.get() for _ in range(2)] and recall.now(), daemon=True).start()
    with pytest.raises(Recalled):
        http_.request("poll", query={"wait": 60}, timeout=DEADLINE, recall=recall)
    assert server._open[0].recv(1) == b""  # the server sees that nobody waits
    with pytest.raises(Recalled):
        http_.request("poll", query={"wait": 60}, timeout=DEADLINE, recall=recall)
    assert server.requests.empty()


def test_taking_back_what_has_its_answer_does_nothing(server: Server, http_: HttpTransport) -> None:
    recall = Recall()
    server.answer("200 OK", b'{"cursor": 7}')
    assert interpret("poll", http_.request("poll", timeout=DEADLINE, recall=recall)) == Poll(cursor=7)
    recall.now()
    server.answer("200 OK", b'{"cursor": 8}')
    assert interpret("poll", poll(http_)) == Poll(cursor=8)
    assert server.connections == 1


def test_a_problem_is_the_error_that_it_names(server: Server, http_: HttpTransport) -> None:
    server.answer("409 Conflict", PROBLEM_BODY, PROBLEM + "; charset=utf-8")
    with pytest.raises(e.ClaimRefused, match="held") as caught:
        interpret("claim", http_.request("claim", body=b"{}", timeout=DEADLINE))
    assert (caught.value.request_id, caught.value.http_status) == ("r1", 409)


@pytest.mark.parametrize(
    ("status", "body", "kind", "error"),
    [
        ("200 OK", b"<html>login</html>", "text/html", e.BadAnswer),
        ("200 OK", b'{"cursor": "x"}', "application/json", e.BadAnswer),
        ("302 Found", b"", "text/html", e.BadAnswer),
        ("403 Forbidden", b"blocked", "text/plain", e.BadAnswer),
        ("413 Too Large", b"nginx", "text/html", e.TooLarge),
        ("429 Too Many", b"", "text/html", e.RateLimited),
        ("502 Bad Gateway", b"nginx", "text/html", e.Unavailable),
        ("503 Unavailable", b"nginx", "text/html", e.Unavailable),
        ("500 Oops", b'{"title": 1}', PROBLEM, e.BadAnswer),
        ("500 Oops", b'{"title": "t", "status": 500, "code": "plan"}', PROBLEM, e.DirectorError),
    ],
)
def test_every_answer_is_a_value_or_a_typed_error(
    server: Server, http_: HttpTransport, status: str, body: bytes, kind: str, error: type[e.DirectorError]
) -> None:
    server.answer(status, body, kind, "Retry-After: 7\r\n")
    with pytest.raises(e.DirectorError) as caught:
        interpret("poll", poll(http_))
    assert type(caught.value) is error
    if error in (e.RateLimited, e.Unavailable):
        assert caught.value.details["retry_after"] == 7


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", e.DirectorUnreachable),
        (b"SSH-2.0-OpenSSH_9.2\r\n", e.BadAnswer),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", e.BadAnswer),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", e.BadAnswer),
        (b"HTTP/1.1 abc\r\n\r\n", e.BadAnswer),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200, e.BadAnswer),
    ],
)
def test_what_is_cut_or_is_no_http_is_a_typed_error(
    server: Server, http_: HttpTransport, data: bytes, error: type[e.DirectorError]
) -> None:
    server.raw(data, close=True)
    with pytest.raises(error) as caught:
        poll(http_)
    assert type(caught.value) is error
    assert caught.value.__cause__ is not None


def test_nobody_there_is_a_typed_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(e.DirectorUnreachable, match="does not answer"):
        poll(HttpTransport(f"http://127.0.0.1:{port}", "t"))


def test_an_answer_that_does_not_come_is_a_timeout(server: Server, http_: HttpTransport) -> None:
    with pytest.raises(e.DirectorTimeout):
        poll(http_, timeout=0.05)
    server.answer("200 OK", b"{}")  # for the first request; its connection is not used again
    server.answer("200 OK", b"{}")
    poll(http_)
    assert server.connections == 2


def test_a_file_is_sent_from_where_it_is_asked_for(server: Server, http_: HttpTransport, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 4096)
    server.answer("200 OK", b'{"digest": "d", "offset": 700000}')
    body = FileBody(path=str(tmp_path / "f"), offset=10, size=700_000)
    answer = http_.request("put_blob", path={"digest": "d"}, query={"offset": 10}, body=body, timeout=DEADLINE)
    assert interpret("put_blob", answer) == BlobStatus(digest="d", offset=700000)
    assert server.requests.get()[1] == (bytes(range(256)) * 4096)[10:700_010]


@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_is_too_short_or_gone_is_no_fault_of_the_line(
    server: Server, http_: HttpTransport, tmp_path: Path, there: bool
) -> None:
    if there:
        (tmp_path / "f").write_bytes(b"short")
    body = FileBody(path=str(tmp_path / "f"), offset=0, size=100)
    with pytest.raises(FileFault):
        http_.request("put_blob", path={"digest": "d"}, body=body, timeout=DEADLINE)


def test_a_blob_goes_to_the_sink_with_offsets_even_if_the_range_is_ignored(
    server: Server, http_: HttpTransport
) -> None:
    got: list[tuple[int, bytes]] = []
    server.answer("206 Partial Content", b"rest", "application/octet-stream")
    http_.request("get_blob", path={"digest": "d"}, timeout=DEADLINE, start=5, sink=lambda *a: got.append(a))
    server.answer("200 OK", b"whole rest", "application/octet-stream")
    http_.request("get_blob", path={"digest": "d"}, timeout=DEADLINE, start=5, sink=lambda *a: got.append(a))
    assert got == [(5, b"rest"), (0, b"whole rest")]
    assert b"Range: bytes=5-\r\n" in server.requests.get()[0]


def test_an_error_does_not_go_to_the_sink(server: Server, http_: HttpTransport) -> None:
    got: list[Any] = []
    server.answer("404 Not Found", b'{"title": "t", "status": 404, "code": "not_found"}', PROBLEM)
    answer = http_.request("get_blob", path={"digest": "d"}, timeout=DEADLINE, sink=lambda *a: got.append(a))
    with pytest.raises(e.NotFound):
        interpret("get_blob", answer)
    assert got == []


def test_requests_may_be_under_way_at_once_and_closing_ends_them(server: Server, http_: HttpTransport) -> None:
    errors: queue.Queue[BaseException] = queue.Queue()

    def wait() -> None:
        try:
            poll(http_)
        except e.DirectorError as error:
            errors.put(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        server.requests.get(timeout=DEADLINE)
    http_.close()
    for thread in threads:
        thread.join(DEADLINE)
    assert errors.qsize() == 3
    with pytest.raises(e.DirectorUnreachable, match="closed"):
        poll(http_)


def test_through_a_proxy_the_whole_address_is_asked_for(server: Server) -> None:
    transport = HttpTransport("http://director.example:1234", "t", proxy=f"http://me:p%40ss@127.0.0.1:{server.port}")
    server.answer("200 OK", b"{}")
    poll(transport)
    head, _ = server.requests.get()
    assert head.startswith(b"GET http://director.example:1234/v1/executor/poll?")
    assert b"Host: director.example:1234\r\n" in head
    assert b"Proxy-Authorization: Basic bWU6cEBzcw==\r\n" in head
    transport.close()


def test_through_a_proxy_https_is_tunnelled(server: Server) -> None:
    transport = HttpTransport("https://director.example", "t", proxy=f"127.0.0.1:{server.port}")
    server.raw(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", close=True)
    with pytest.raises(e.DirectorUnreachable, match="407"):
        poll(transport)
    assert server.requests.get()[0].startswith(b"CONNECT director.example:443")
    transport.close()


@pytest.mark.parametrize(
    ("url", "environ", "proxy"),
    [
        ("http://d.example", {}, None),
        ("http://d.example", {"http_proxy": "http://p:1"}, "http://p:1"),
        ("http://d.example", {"HTTP_PROXY": "http://p:1"}, None),
        ("https://d.example", {"http_proxy": "http://p:1"}, None),
        ("https://d.example", {"HTTPS_PROXY": "http://p:1"}, "http://p:1"),
        ("https://d.example", {"all_proxy": "http://p:1"}, "http://p:1"),
        ("http://127.0.0.1:80", {"http_proxy": "http://p:1"}, None),
        ("http://d.example", {"http_proxy": "http://p:1", "no_proxy": "*"}, None),
        ("http://d.example", {"http_proxy": "http://p:1", "no_proxy": "x, .example"}, None),
        ("http://d.example:8", {"http_proxy": "http://p:1", "no_proxy": "d.example:9"}, "http://p:1"),
        ("http://d.example:9", {"http_proxy": "http://p:1", "NO_PROXY": "d.example:9"}, None),
        ("http://bad.example", {"http_proxy": "http://p:1", "no_proxy": "d.example"}, "http://p:1"),
        ("http://[fd00::1]:8", {"http_proxy": "http://p:1", "no_proxy": "fd00::1"}, None),
    ],
)
def test_the_environment_says_which_proxy(url: str, environ: dict[str, str], proxy: str | None) -> None:
    assert proxy_for(url, environ) == proxy


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{name}.key").write_bytes(key.private_bytes(*form))
    return folder / f"{name}.pem", folder / f"{name}.key"


def test_over_tls_only_a_director_with_the_right_certificate_is_spoken_to(tmp_path: Path) -> None:
    right, key = certificate(tmp_path, "right")
    wrong, _ = certificate(tmp_path, "wrong")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(right, key)
    server = Server(context=context)
    url = f"https://127.0.0.1:{server.port}"
    server.answer("200 OK", b'{"cursor": 5}')
    trusting = HttpTransport(url, "t", ca=str(right))
    assert interpret("poll", poll(trusting)).cursor == 5
    with pytest.raises(e.DirectorUnreachable, match="certificate verify failed"):
        poll(HttpTransport(url, "t", ca=str(wrong)))
    assert server.requests.qsize() == 1
    trusting.close()
    server.close()


def test_a_director_that_was_restarted_is_found_again() -> None:
    first = Server()
    transport = HttpTransport(f"http://127.0.0.1:{first.port}", "t")
    first.answer("200 OK", b"{}")
    poll(transport)
    first.close()
    with pytest.raises(e.DirectorUnreachable):
        poll(transport)
    second = Server(port=first.port)
    second.answer("200 OK", b'{"cursor": 9}')
    assert interpret("poll", poll(transport)).cursor == 9
    transport.close()
    second.close()


@pytest.mark.parametrize("url", ["ftp://x", "director", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(e.ConfigurationError):
        HttpTransport(url, "t")


def test_a_certificate_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(e.ConfigurationError, match="certificates"):
        HttpTransport("https://d.example", "t", ca="/nowhere.pem")


# --- the pipe ---------------------------------------------------------------------------------------------------------


class Peer:
    """The other end of a pipe: gives requests, takes answers."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(DEADLINE)
        self._unpacker = Unpacker()
        self._waiting: list[tuple[dict[str, Any], bytes]] = []

    def next(self) -> tuple[dict[str, Any], bytes]:
        while not self._waiting:
            self._waiting += self._unpacker.feed(self.sock.recv(1 << 16))
        return self._waiting.pop(0)

    def answer(self, number: int, status: int = 200, body: bytes = b"{}") -> None:
        self.sock.sendall(pack({"id": number, "status": status}, body))


@pytest.fixture
def pipe() -> Iterator[tuple[PipeTransport, Peer]]:
    ours, theirs = socket.socketpair()
    transport = PipeTransport(ours)
    yield transport, Peer(theirs)
    transport.close()
    theirs.close()


def concurrently(*calls: Callable[[], Any]) -> tuple[list[threading.Thread], dict[int, Any]]:
    results: dict[int, Any] = {}

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except e.FieldlabError as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


def test_answers_find_their_requests_in_any_order(pipe: tuple[PipeTransport, Peer]) -> None:
    transport, peer = pipe
    threads, results = concurrently(
        lambda: transport.request("report", query={"lane": "control"}, body=b"up", timeout=DEADLINE),
        lambda: poll(transport),
    )
    asked = {header["endpoint"]: (header, body) for header, body in (peer.next(), peer.next())}
    assert asked["poll"][0]["query"] == {"after": 3, "wait": 0.5, "journal": "j"}
    assert asked["report"][1] == b"up"
    peer.answer(asked["poll"][0]["id"], body=b'{"cursor": 1}')
    threads[1].join(DEADLINE)
    peer.answer(asked["report"][0]["id"], body=b'{"acked": 2}')
    threads[0].join(DEADLINE)
    assert interpret("poll", results[1]).cursor == 1
    assert interpret("report", results[0]).acked == 2


def test_a_problem_over_the_pipe_is_the_same_error(pipe: tuple[PipeTransport, Peer]) -> None:
    transport, peer = pipe
    threads, results = concurrently(lambda: poll(transport))
    peer.answer(peer.next()[0]["id"], 409, PROBLEM_BODY)
    threads[0].join(DEADLINE)
    with pytest.raises(e.ClaimRefused):
        interpret("poll", results[0])


def test_a_blob_over_the_pipe_comes_in_pieces(pipe: tuple[PipeTransport, Peer]) -> None:
    transport, peer = pipe
    data = os.urandom(2 * transport.chunk + 5)
    got: dict[int, bytes] = {}
    threads, results = concurrently(
        lambda: transport.request(
            "get_blob", path={"digest": "d"}, timeout=DEADLINE, start=3, sink=lambda at, block: got.update({at: block})
        )
    )
    for _ in range(3):
        header, _ = peer.next()
        offset, limit = header["query"]["offset"], header["query"]["limit"]
        peer.answer(header["id"], body=data[offset : offset + limit])
    threads[0].join(DEADLINE)
    assert results[0].status == 206
    assert b"".join(got[at] for at in sorted(got)) == data[3:]


def test_a_late_answer_is_nobodys(pipe: tuple[PipeTransport, Peer]) -> None:
    transport, peer = pipe
    with pytest.raises(e.DirectorTimeout):
        poll(transport, timeout=0.01)
    peer.answer(peer.next()[0]["id"], body=b'{"cursor": 1}')
    threads, results = concurrently(lambda: poll(transport))
    peer.answer(peer.next()[0]["id"], body=b'{"cursor": 2}')
    threads[0].join(DEADLINE)
    assert interpret("poll", results[0]).cursor == 2


def test_when_the_client_is_gone_everybody_is_told_and_nobody_waits(pipe: tuple[PipeTransport, Peer]) -> None:
    transport, peer = pipe
    threads, results = concurrently(lambda: poll(transport), lambda: poll(transport))
    peer.next()
    peer.next()
    peer.sock.close()
    for thread in threads:
        thread.join(DEADLINE)
    assert [type(result) for result in results.values()] == [PipeClosed, PipeClosed]
    with pytest.raises(PipeClosed):
        poll(transport)


@pytest.mark.parametrize("garbage", [b"\xff" * 8, pack({"id": "x", "status": 1}), pack({"id": 1, "status": 9999})])
def test_garbage_ends_the_pipe(pipe: tuple[PipeTransport, Peer], garbage: bytes) -> None:
    transport, peer = pipe
    threads, results = concurrently(lambda: poll(transport))
    peer.next()
    peer.sock.sendall(garbage)
    threads[0].join(DEADLINE)
    assert isinstance(results[0], PipeClosed)


def test_the_inherited_descriptor_is_not_inherited_further() -> None:
    ours, theirs = socket.socketpair()
    ours.set_inheritable(True)
    descriptor = ours.detach()
    transport = pipe_of(descriptor)
    assert not os.get_inheritable(descriptor)
    transport.close()
    theirs.close()


def test_a_request_over_the_pipe_is_taken_back_and_the_other_end_is_told(pipe: tuple[PipeTransport, Peer]) -> None:
    transport, peer = pipe
    recall = Recall()

    def take_back() -> None:
        header, _ = peer.next()
        recall.now()
        peer.answer(header["id"])  # too late

    thread = threading.Thread(target=take_back)
    thread.start()
    with pytest.raises(Recalled):
        transport.request("poll", query={"wait": 60}, timeout=DEADLINE, recall=recall)
    thread.join()
    assert peer.next()[0] == {"recall": 1}
