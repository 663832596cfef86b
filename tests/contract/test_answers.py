"""The real client, over a real socket, and everything that can come back: a value, or one error that says what to do.

Each case is a server that misbehaves in one way. None may make the client hang, and none may show what httpx2 says.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fieldlab import transport
from fieldlab.artifacts import fetch
from fieldlab.http import HttpTransport
from fieldlab.source import DirectorSource
from fieldlab.transport import Session, Settings, check
from fieldlab_common import errors as e
from fieldlab_common import protocol as p
from fieldlab_common import wire

HEALTH = wire.dumps(p.Health(version="9"))
_OTHERS = {p.Caller.EXECUTOR, p.Caller.UPLOADER, p.Caller.AGENT, p.Caller.RENEWER}
USERS = [row for row in p.ENDPOINTS.values() if not set(row.callers) <= _OTHERS]
SHORT = 0.4  # seconds until a server that goes on for ever is left
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.fixture
def ask() -> Iterator[Callable[..., Session]]:
    """A function that makes a session with a server; it does not try again unless it is told to."""
    made: list[Session] = []

    def session(url: str, *, timeout: float = 20.0, patience: float = 0.0, ca: str | None = None) -> Session:
        settings = Settings(timeout=timeout, first=patience, patience=patience, delay=0.01)
        made.append(Session(url, "t", HttpTransport(url, ca=ca), settings))
        return made[-1]

    yield session
    for one in made:
        one.close()


def call(session: Session, row: p.Endpoint) -> Any:
    """Ask an endpoint as the client does."""
    path = {name: "x" for _, name, _, _ in string.Formatter().parse(row.path) if name}
    if row.response is bytes:
        with session.stream(row.name, path=path) as stream:
            check(row, stream.answer, session.base)
            return b"".join(stream.chunks)
    return session.call(row.name, row.response, path=path, body={})  # of the body only that it is sent matters here


def health(session: Session) -> Any:
    return session.call("health", p.Health)


# --- what is documented -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", USERS, ids=lambda row: row.name)
def test_every_error_that_an_endpoint_documents_is_raised_as_its_own_type(
    row: p.Endpoint, serve: Any, ask: Any
) -> None:
    documented = dict.fromkeys((*row.errors, *p.COMMON_ERRORS))
    del documented[e.ProtocolMismatch]  # one that the client asks back about: it has tests of its own below
    server = serve(*[lambda x, cls=cls: x.problem(cls.code, cls.status, request_id="r7") for cls in documented])
    session = ask(server.url)
    for cls in documented:
        with pytest.raises(cls) as caught:
            call(session, row)
        assert type(caught.value) is cls
        assert str(caught.value) == "What happened. Do this."
    assert len(server.seen) == len(documented)


def test_the_codes_of_the_documentation_are_those_that_are_raised() -> None:
    raised = {cls for row in p.ENDPOINTS.values() for cls in (*row.errors, *p.COMMON_ERRORS)}
    assert {e.BY_CODE[cls.code] for cls in raised} == raised  # docs/errors.md is compared with BY_CODE in tests/docs


# --- what is not the protocol -----------------------------------------------------------------------------------------

PAGE = b"<html><body><h1>Please log in</h1></body></html>"
STRANGE: dict[str, tuple[Callable[[Any], None], type[e.FieldlabError], str]] = {
    "a proxy's page": (lambda x: x.answer(PAGE, "text/html"), e.BadAnswer, "Please log in"),
    "a proxy's page, 502": (lambda x: x.answer(PAGE, "text/html", 502), e.Unavailable, "proxy stands before"),
    "a proxy's page, 413": (lambda x: x.answer(PAGE, "text/html", 413), e.TooLarge, "proxy on the way"),
    "a proxy's page, 429": (lambda x: x.answer(PAGE, "text/html", 429), e.RateLimited, "no more requests"),
    "a proxy that asks who it is": (lambda x: x.answer(b"", "", 407), e.DirectorUnreachable, "HTTPS_PROXY"),
    "401 and nothing": (lambda x: x.answer(b"", "", 401), e.AuthenticationError, "FIELDLAB_TOKEN"),
    "500 and nothing": (lambda x: x.answer(b"", "", 500), e.BadAnswer, "status 500"),
    "500 and a page": (lambda x: x.answer(PAGE, "text/html", 500), e.BadAnswer, "status 500"),
    "503 and nothing": (lambda x: x.answer(b"", "", 503), e.Unavailable, "Try again later"),
    "a redirect": (lambda x: x.answer(b"", "", 307, location="https://sso.test/"), e.BadAnswer, "sso.test"),
    "a redirect to nowhere": (lambda x: x.answer(b"", "", 302), e.BadAnswer, "redirect"),
    "no content": (lambda x: x.answer(b"", "", 204), e.BadAnswer, "204"),
    "another content type": (lambda x: x.answer(HEALTH, "text/plain"), e.BadAnswer, "text/plain"),
    "no content type": (lambda x: x.answer(HEALTH, ""), e.BadAnswer, "no content type"),
    "no JSON": (lambda x: x.answer(b'{"status": "o'), e.BadAnswer, "form"),
    "nothing": (lambda x: x.answer(b""), e.BadAnswer, "form"),
    "no text": (lambda x: x.answer(b"\xff\xfe\x00"), e.BadAnswer, "form"),
    "JSON of another form": (lambda x: x.answer(b'{"status": 3}'), e.BadAnswer, r"\$\.status"),
    "JSON that is too deep": (lambda x: x.answer(b"[" * 200_000), e.BadAnswer, "form"),
    "a problem that is none": (lambda x: x.answer(b"{}", p.PROBLEM, 404), e.BadAnswer, "status 404"),
    "a code that nobody knows": (lambda x: x.problem("from_the_future", 418), e.DirectorError, "from_the_future"),
    "no HTTP": (lambda x: x.send(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), e.BadAnswer, "cut or malformed"),
    "TLS": (lambda x: x.send(b"\x15\x03\x01\x00\x02\x02\x46\r\n"), e.BadAnswer, "https://"),
    "a body cut by its length": (lambda x: x.send(HEAD + b"content-length: 99\r\n\r\n{"), e.BadAnswer, "cut"),
    "a chunked body that is cut": (
        lambda x: x.send(HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{"),
        e.BadAnswer,
        "cut",
    ),
    "chunks that are none": (
        lambda x: x.send(HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n{"),
        e.BadAnswer,
        "malformed",
    ),
    "headers that are cut": (lambda x: x.send(HEAD[:30]), e.DirectorUnreachable, "broke"),
    "headers without end": (lambda x: x.send(HEAD + b"x: y\r\n" * 50_000), e.BadAnswer, "malformed"),
    "no answer": (lambda x: None, e.DirectorUnreachable, "broke"),
    "a reset": (lambda x: x.reset(), e.DirectorUnreachable, "broke"),
    "a reset in the body": (
        lambda x: (x.send(HEAD + b"content-length: 99\r\n\r\n{"), x.reset()),
        e.DirectorError,
        "127.0.0.1",
    ),
    "gzip that is none": (lambda x: x.answer(HEALTH, content_encoding="gzip"), e.BadAnswer, "encoded"),
    "gzip that is cut": (lambda x: x.answer(gzip.compress(HEALTH)[:-9], content_encoding="gzip"), e.BadAnswer, "early"),
    "another coding": (lambda x: x.answer(HEALTH, content_encoding="br"), e.BadAnswer, "'br'"),
    "gzip that grows": (
        lambda x: x.answer(gzip.compress(bytes(80 << 20)), content_encoding="gzip"),
        e.BadAnswer,
        "more than",
    ),
    "a silent server": (lambda x: x.silence(), e.DirectorTimeout, r"within 0\.4 s"),
    "silence in the headers": (lambda x: (x.send(HEAD[:30]), x.silence()), e.DirectorTimeout, "within"),
    "silence in the body": (
        lambda x: (x.send(HEAD + b"content-length: 99\r\n\r\n{"), x.silence()),
        e.DirectorTimeout,
        "within",
    ),
    "headers that drip": (lambda x: (x.send(HEAD), x.drip(b"x: y\r\n")), e.DirectorTimeout, "within"),
    "a body that drips": (lambda x: (x.send(HEAD + b"\r\n"), x.drip(b" ")), e.DirectorTimeout, "within"),
    "100 Continue without end": (lambda x: x.drip(b"HTTP/1.1 100 Continue\r\n\r\n"), e.DirectorTimeout, "within"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_an_answer_is_told_apart(name: str, serve: Any, ask: Any) -> None:
    play, error, words = STRANGE[name]
    timeout = SHORT if error is e.DirectorTimeout else 20.0
    with pytest.raises(error, match=words) as caught:
        health(ask(serve(play).url, timeout=timeout))
    assert "httpx" not in str(caught.value)
    assert caught.value.advice


@pytest.mark.parametrize("name", [name for name, case in STRANGE.items() if case[1] is not e.DirectorTimeout])
def test_a_file_that_is_not_one_is_told_apart_too(name: str, serve: Any, ask: Any) -> None:
    play, _, _ = STRANGE[name]
    source = DirectorSource(ask(serve(play).url), "run")
    with pytest.raises(e.DirectorError):
        fetch(source, hashlib.sha256(b"what was announced").hexdigest(), 18)


def test_a_refused_file_is_not_read_to_its_end(serve: Any, ask: Any) -> None:
    server = serve(lambda x: x.answer(b"x" * (8 << 20), "text/html", 404))
    with pytest.raises(e.BadAnswer, match="more than 1048576 bytes"):
        call(ask(server.url), p.ENDPOINTS["get_blob"])


def test_an_answer_without_end_is_left(serve: Any, ask: Any) -> None:
    def endless(x: Any) -> None:
        x.send(HEAD + b"\r\n")
        while True:
            x.send(b" " * (1 << 20))

    with pytest.raises(e.BadAnswer, match="more than 67108864 bytes"):
        health(ask(serve(endless).url))


def test_a_file_may_take_longer_than_one_answer_as_long_as_it_comes(serve: Any, ask: Any) -> None:
    def slow(x: Any) -> None:
        x.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 60\r\n\r\n")
        for _ in range(60):
            x.send(b"x")
            x._over.wait(0.02)

    assert call(ask(serve(slow).url, timeout=SHORT), p.ENDPOINTS["get_blob"]) == b"x" * 60


def test_a_file_that_stops_coming_is_left(serve: Any, ask: Any) -> None:
    def stops(x: Any) -> None:
        x.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ncontent-length: 60\r\n\r\nx")
        x.silence()

    with pytest.raises(e.DirectorTimeout):
        call(ask(serve(stops).url, timeout=SHORT), p.ENDPOINTS["get_blob"])


def test_a_compressed_answer_is_read(serve: Any, ask: Any) -> None:
    server = serve(lambda x: x.answer(gzip.compress(HEALTH), content_encoding="gzip"))
    assert health(ask(server.url)).version == "9"
    assert server.seen[0].headers["accept-encoding"] == "gzip"


def test_what_nobody_listens_for_is_said_with_what_to_check(serve: Any, ask: Any) -> None:
    server = serve(lambda x: None)
    server.close()
    with pytest.raises(e.DirectorUnreachable, match="No director answers") as caught:
        health(ask(server.url))
    assert "FIELDLAB_ENDPOINT" in str(caught.value)


def test_a_connection_that_is_reset_before_anything_was_heard_is_unreachable(serve: Any, ask: Any) -> None:
    with pytest.raises(e.DirectorUnreachable):  # while it connects, or after that
        health(ask(serve(good, slams=True).url))


def test_a_name_that_nobody_knows_is_said(ask: Any) -> None:
    with pytest.raises(e.DirectorUnreachable, match=r"No director answers at http://no-such-host\.invalid"):
        health(ask("http://no-such-host.invalid"))


@pytest.mark.parametrize("token", ["a\nb", "a b", "ä", "a\x00", "a\r\nx: y"])
def test_a_token_that_cannot_be_sent_is_a_matter_of_configuration(token: str, serve: Any) -> None:
    server = serve(lambda x: x.answer(HEALTH))
    with pytest.raises(e.ConfigurationError, match="token"):
        Session(server.url, token, HttpTransport(server.url)).call("health", p.Health)
    assert not server.seen


# --- again, and not again ---------------------------------------------------------------------------------------------


def broken(x: Any) -> None:
    """The connection ends, after everything was sent."""
    x.reset()


def good(x: Any) -> None:
    """What health answers."""
    x.answer(HEALTH)


@pytest.mark.parametrize(
    "first",
    [
        broken,
        lambda x: x.answer(PAGE, "text/html", 502),
        lambda x: x.problem("unavailable", 503),
        lambda x: x.problem("rate_limited", 429),
        lambda x: x.answer(b"", "", 503, retry_after="0"),
        lambda x: x.send(HEAD + b"content-length: 99\r\n\r\n{"),
    ],
    ids=["reset", "502", "503", "429", "retry-after", "cut"],
)
def test_what_is_safe_is_asked_again(first: Any, serve: Any, ask: Any) -> None:
    server = serve(good, first, first, good)
    session = ask(server.url, patience=30.0)
    health(session)
    assert health(session).version == "9"
    assert len(server.seen) == 4


def test_a_director_that_says_it_is_not_ready_yet_is_waited_for_from_the_first_call(serve: Any) -> None:
    server = serve(lambda x: x.problem("unavailable", 503), lambda x: x.problem("unavailable", 503), good)
    slept: list[float] = []
    one = Session(server.url, None, HttpTransport(server.url), Settings(delay=2.0), sleep=slept.append)
    assert health(one).version == "9"
    assert len(slept) == 2
    one.close()


@pytest.mark.parametrize("first", [broken, lambda x: x.problem("unavailable", 503)], ids=["reset", "503"])
def test_what_is_not_safe_is_not_asked_again_once_it_was_sent(first: Any, serve: Any, ask: Any) -> None:
    server = serve(good, first)
    session = ask(server.url, patience=30.0)
    health(session)
    body = p.AttachInfrastructure(name="x", spec=p.Tagged(kind="local"))
    with pytest.raises(e.DirectorError):
        session.call("attach_infrastructure", p.InfrastructureInfo, body=body)
    assert len(server.seen) == 2


def test_a_server_that_calls_for_a_wait_beyond_patience_is_not_waited_for(serve: Any, ask: Any) -> None:
    server = serve(good, lambda x: x.answer(b"", "", 429, retry_after="90"))
    session = ask(server.url, patience=30.0)
    health(session)
    with pytest.raises(e.RateLimited) as caught:
        health(session)
    assert caught.value.details["retry_after"] == 90.0


@pytest.mark.parametrize("value", ["²", "-1", "1e9", "nan", "9" * 400, "Wed, 99 Foo", "soon"])
def test_a_retry_after_that_makes_no_sense_does_no_harm(value: str, serve: Any, ask: Any) -> None:
    def busy(x: Any) -> None:
        x.send(b"HTTP/1.1 503 X\r\ncontent-length: 0\r\nretry-after: " + value.encode("latin-1") + b"\r\n\r\n")

    with pytest.raises(e.Unavailable):
        health(ask(serve(busy).url))


def test_a_director_cannot_make_an_unsafe_call_be_repeated(serve: Any, ask: Any) -> None:
    refuse = [lambda x: x.problem("unavailable", 503, details={"sent": False})]
    server = serve(good, *refuse)
    session = ask(server.url, patience=30.0)
    health(session)
    with pytest.raises(e.Unavailable):
        session.call("attach_infrastructure", p.InfrastructureInfo, body=p.AttachInfrastructure(name="x", spec=_LOCAL))
    assert len(server.seen) == 2


_LOCAL = p.Tagged(kind="local")


# --- versions ---------------------------------------------------------------------------------------------------------


def director_of(*protocols: int) -> Callable[[Any], None]:
    """A director that speaks those versions: it refuses others, and answers in forms of its own."""

    def play(x: Any) -> None:
        if x.target.endswith("/health"):
            x.answer(wire.dumps(p.Health(version="7.0", protocols=protocols)))
        elif int(x.headers["fieldlab-protocol"]) not in protocols:
            x.problem("protocol_mismatch", 426)
        else:
            x.answer(wire.dumps(p.Principal(user="ann", role="member")))

    return play


@pytest.mark.parametrize(("versions", "advice"), [((2, 3), "Upgrade fieldlab here"), ((0,), "upgrade it")])
def test_a_director_of_another_protocol_is_refused_with_both_versions_named(
    versions: tuple[int, ...], advice: str, serve: Any, ask: Any
) -> None:
    session = ask(serve(director_of(*versions)).url)
    with pytest.raises(e.ProtocolMismatch, match=r"speaks protocol .*this client speaks 1") as caught:
        session.call("whoami", p.Principal)
    assert ", ".join(map(str, versions)) in str(caught.value)
    assert advice in caught.value.advice


def test_the_newest_version_that_both_speak_is_found_and_kept(
    serve: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PROTOCOL", 3)
    monkeypatch.setattr(transport, "PROTOCOLS", (1, 2, 3))
    server = serve(director_of(1, 2))
    session = ask(server.url)
    for _ in range(2):
        assert session.call("whoami", p.Principal).user == "ann"
    spoken = [x.headers["fieldlab-protocol"] for x in server.seen if x.target.endswith("/me")]
    assert spoken == ["3", "2", "2"]


def test_an_answer_that_a_newer_director_gives_is_explained_by_its_version(serve: Any, ask: Any) -> None:
    def newer(x: Any) -> None:
        if x.target.endswith("/health"):
            x.answer(wire.dumps(p.Health(version="7.0", protocols=(2,))))
        else:
            x.answer(b'{"nodes": "as a text now"}')

    with pytest.raises(e.ProtocolMismatch, match=r"director at .* \(7\.0\) speaks protocol 2"):
        ask(serve(newer).url).call("nodes", p.NodeList)


# --- what a user sees -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a reset", "no HTTP", "a proxy's page, 502", "a silent server"])
def test_an_error_that_nobody_catches_shows_nothing_of_what_is_underneath(name: str, serve: Any) -> None:
    server = serve(STRANGE[name][0])
    code = f"import fieldlab as fl; fl.Client({server.url!r}, 't', timeout={SHORT}).whoami()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "httpx" not in done.stderr
    assert "httpcore" not in done.stderr
    assert "fieldlab_common.errors." in done.stderr.splitlines()[-1]


def test_the_message_of_a_refusal_cannot_drive_a_terminal(serve: Any, ask: Any) -> None:
    server = serve(lambda x: x.problem("not_found", 404, detail="\x1b[2J\x9bgone", advice="\x1b]0;x\x07"))
    with pytest.raises(e.NotFound) as caught:
        health(ask(server.url))
    assert not {"\x1b", "\x9b", "\x07"} & set(str(caught.value))


def test_numbers_that_json_does_not_have_are_no_answer(serve: Any, ask: Any) -> None:
    server = serve(lambda x: x.answer(json.dumps({"time": float("nan")}).encode()))
    with pytest.raises(e.BadAnswer):
        health(ask(server.url))
