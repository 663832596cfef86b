"""Every answer that a director, a proxy or a broken line can give ends in a value or in one typed error.

The second half drives the real client over a real socket against a server that misbehaves on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from fieldlab.http import HttpTransport
from fieldlab.transport import Answer, Request, Session, Settings, Stream, build, parse, retry_after
from fieldlab_common import errors as e
from fieldlab_common import protocol as p
from fieldlab_common import wire

BASE = "http://director.test"
JSON = {"content-type": "application/json; charset=utf-8"}
HEALTH = p.ENDPOINTS["health"]


def problem(code: str, status: int, **extra: Any) -> Answer:
    body = json.dumps({"title": "T", "status": status, "code": code, "detail": "What happened.", **extra}).encode()
    return Answer(status=status, headers={"content-type": p.PROBLEM}, body=body)


class Script:
    """A transport that plays answers and errors in order, the last one for ever."""

    def __init__(self, *steps: Answer | e.FieldlabError) -> None:
        self.steps, self.sent = list(steps), list[Request]()

    def send(self, request: Request) -> Answer:
        self.sent.append(request)
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if isinstance(step, e.FieldlabError):
            raise step
        return step

    def stream(self, request: Request) -> AbstractContextManager[Stream]:
        raise NotImplementedError

    def close(self) -> None:
        pass


OK = Answer(status=200, headers=JSON, body=wire.dumps(p.Health(version="9")))


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_has_its_path_escaped_and_its_empty_query_left_out() -> None:
    request = build(
        p.ENDPOINTS["records"],
        BASE + "/",
        token="t",
        path={"experiment": "a/b#2"},
        query={"lane": "bulk", "after": None},
    )
    assert request.url == BASE + "/v1/experiments/a%2Fb%232/records?lane=bulk"
    assert request.headers["authorization"] == "Bearer t"


def test_an_empty_message_is_sent_as_an_empty_object() -> None:
    assert build(p.ENDPOINTS["start"], BASE, path={"experiment": "x"}).body == b"{}"


# --- answers ----------------------------------------------------------------------------------------------------------


def test_a_good_answer_becomes_its_type() -> None:
    assert parse(HEALTH, OK, BASE) == p.Health(version="9")


@pytest.mark.parametrize("row", p.ENDPOINTS.values(), ids=lambda row: row.name)
def test_every_documented_error_is_raised_as_its_own_type(row: p.Endpoint) -> None:
    for cls in (*row.errors, *p.COMMON_ERRORS):
        with pytest.raises(cls) as caught:
            parse(row, problem(cls.code, cls.status, advice="Do this.", request_id="r1", details={"k": 1}), BASE)
        assert caught.value.advice == "Do this."
        assert caught.value.details["k"] == 1
        assert "What happened." in str(caught.value)


def test_an_unknown_code_is_still_a_directors_error_and_names_the_code() -> None:
    with pytest.raises(e.DirectorError, match="from_the_future"):
        parse(HEALTH, problem("from_the_future", 418), BASE)


def test_a_problem_text_cannot_drive_the_terminal() -> None:
    with pytest.raises(e.NotFound) as caught:
        parse(HEALTH, problem("not_found", 404, detail="\x1b[2Jgone"), BASE)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (Answer(status=200, headers={"content-type": "text/html"}, body=b"<html>Log in"), e.BadAnswer, "Log in"),
        (Answer(status=404, headers={"content-type": "text/html"}, body=b"nginx"), e.BadAnswer, "nginx"),
        (Answer(status=502, headers={"content-type": "text/html"}, body=b"Bad Gateway"), e.Unavailable, "proxy"),
        (Answer(status=302, headers={"location": "https://login.test/"}), e.BadAnswer, "login.test"),
        (Answer(status=200, headers=JSON, body=b'{"status": "o'), e.BadAnswer, "form"),
        (Answer(status=200, headers=JSON, body=b'{"status": 3}'), e.BadAnswer, "form"),
        (Answer(status=200, headers=JSON, body=b"[" * 100_000), e.BadAnswer, "form"),
        (Answer(status=500, headers={"content-type": p.PROBLEM}, body=b"{"), e.BadAnswer, "500"),
        (Answer(status=401, headers={}), e.AuthenticationError, "authentication"),
        (Answer(status=204, headers={}), e.BadAnswer, "204"),
    ],
)
def test_what_is_not_the_protocol_is_told_apart(answer: Answer, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        parse(HEALTH, answer, BASE)


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert retry_after({"retry-after": "7"}) == 7.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None


# --- retries ----------------------------------------------------------------------------------------------------------


def session(script: Script, time: Any, **settings: Any) -> Session:
    made = Session(BASE, "t", script, Settings(**settings), clock=time.clock, sleep=time.sleep, jitter=lambda: 1.0)
    return made


def test_a_safe_call_is_tried_again_with_growing_pauses(fake_time: Any) -> None:
    down = e.DirectorUnreachable("no", details={"sent": True})
    one = session(Script(OK, down, down, down, OK), fake_time)
    one.call("health", p.Health)
    assert one.call("health", p.Health).version == "9"
    assert fake_time.slept == [0.1, 0.2, 0.4]


def test_an_unsafe_call_is_not_repeated_once_it_was_sent(fake_time: Any) -> None:
    script = Script(e.DirectorTimeout("late"))
    body = p.AttachInfrastructure(name="n", spec=p.Tagged(kind="local"))
    with pytest.raises(e.DirectorTimeout):
        session(script, fake_time).call("attach_infrastructure", p.InfrastructureInfo, body=body)
    assert len(script.sent) == 1


def test_an_unsafe_call_is_repeated_when_nothing_was_sent(fake_time: Any) -> None:
    info = p.InfrastructureInfo(name="n", kind="local")
    made = Answer(status=201, headers=JSON, body=wire.dumps(info))
    script = Script(e.DirectorUnreachable("no", details={"sent": False}), made)
    body = p.AttachInfrastructure(name="n", spec=p.Tagged(kind="local"))
    assert session(script, fake_time).call("attach_infrastructure", p.InfrastructureInfo, body=body) == info


def test_where_nothing_ever_answered_the_caller_is_told_soon(fake_time: Any) -> None:
    with pytest.raises(e.DirectorUnreachable):
        session(Script(e.DirectorUnreachable("no")), fake_time, first=0.5, patience=60).call("health", p.Health)
    assert fake_time.now < 0.6


def test_patience_ends(fake_time: Any) -> None:
    one = session(Script(OK, e.DirectorUnreachable("no")), fake_time, patience=60)
    one.call("health", p.Health)
    with pytest.raises(e.DirectorUnreachable):
        one.call("health", p.Health)
    assert 50 < fake_time.now <= 60


def test_the_directors_retry_after_is_respected(fake_time: Any) -> None:
    busy = problem("rate_limited", 429)
    busy = Answer(status=429, headers={**busy.headers, "retry-after": "3"}, body=busy.body)
    session(Script(busy, OK), fake_time).call("health", p.Health)
    assert fake_time.slept == [3.0]


def test_a_permanent_error_is_not_retried(fake_time: Any) -> None:
    script = Script(problem("not_found", 404))
    with pytest.raises(e.NotFound):
        session(script, fake_time).call("experiment", p.ExperimentInfo, path={"experiment": "x"})
    assert len(script.sent) == 1


def test_an_answer_of_another_protocol_is_explained_by_the_versions(fake_time: Any) -> None:
    strange = Answer(status=200, headers=JSON, body=b'{"nodes": 3}')
    newer = Answer(status=200, headers=JSON, body=wire.dumps(p.Health(version="7.0", protocols=(2, 3))))
    with pytest.raises(e.ProtocolMismatch, match="speaks protocol 2, 3"):
        session(Script(strange, newer), fake_time).call("nodes", p.NodeList)


# --- over a real socket -----------------------------------------------------------------------------------------------


@pytest.fixture
def real(hostile: Any) -> Iterator[Session]:
    one = Session(hostile.url, "t", HttpTransport(hostile.url), Settings(timeout=5, first=0.0, patience=0.0))
    yield one
    one.close()


def test_a_director_that_answers_is_understood(hostile: Any, reply: Any, real: Session) -> None:
    hostile.script = [reply(200, OK.body, JSON)]
    assert real.call("health", p.Health).version == "9"
    assert hostile.seen[0].headers["authorization"] == "Bearer t"
    assert hostile.seen[0].headers["fieldlab-protocol"] == "1"


def test_a_cut_body_is_seen_and_may_be_tried_again(hostile: Any, reply: Any, real: Session) -> None:
    hostile.script = [reply(raw=b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")]
    with pytest.raises(e.BadAnswer, match="cut") as caught:
        real.call("health", p.Health)
    assert caught.value.details["transient"] is True


def test_what_is_not_http_is_a_bad_answer(hostile: Any, reply: Any, real: Session) -> None:
    hostile.script = [reply(raw=b"SSH-2.0-OpenSSH_9.2\r\n\r\n")]
    with pytest.raises(e.BadAnswer):
        real.call("health", p.Health)


def test_a_connection_closed_without_an_answer_is_unreachable(hostile: Any, reply: Any, real: Session) -> None:
    hostile.script = [reply(raw=b"")]
    with pytest.raises(e.DirectorUnreachable):
        real.call("health", p.Health)


def test_a_silent_server_is_left_at_the_deadline(hostile: Any) -> None:
    hostile.script = [hostile.silent]
    one = Session(hostile.url, None, HttpTransport(hostile.url), Settings(timeout=0.2, first=0.0))
    with pytest.raises(e.DirectorTimeout, match=r"within 0\.2 s"):
        one.call("health", p.Health)
    one.close()


def test_a_redirect_does_not_get_the_token(hostile: Any, reply: Any, real: Session) -> None:
    hostile.script = [reply(307, b"", {"location": hostile.url + "/elsewhere"})]
    with pytest.raises(e.BadAnswer, match="redirect"):
        real.call("nodes", p.NodeList)
    assert not any("elsewhere" in request.path for request in hostile.seen)


def test_an_address_where_nothing_listens_is_unreachable(dead_url: str) -> None:
    one = Session(dead_url, None, HttpTransport(dead_url), Settings(first=0.0))
    with pytest.raises(e.DirectorUnreachable, match="No director answers") as caught:
        one.call("health", p.Health)
    assert "FIELDLAB_ENDPOINT" in str(caught.value)
    assert caught.value.__context__ is not None  # what httpx2 said, which is not printed
    assert caught.value.__suppress_context__


def test_a_proxy_named_by_the_environment_is_not_asked_for_this_machine(
    hostile: Any, reply: Any, real: Session, dead_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", dead_url)
    hostile.script = [reply(200, OK.body, JSON)]
    assert real.call("health", p.Health).status == "ok"


def test_an_endpoint_that_is_no_address_is_a_matter_of_configuration() -> None:
    one = Session("ftp://x", None, HttpTransport("ftp://x"), Settings(first=0.0))
    with pytest.raises(e.ConfigurationError):
        one.call("health", p.Health)
