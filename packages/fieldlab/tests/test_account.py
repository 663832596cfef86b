"""Logging in and out, the user's tokens, and what is said when one has expired; with a real director at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest
from fieldlab.account import ask_password
from fieldlab.transport import Answer, Request, Stream
from fieldlab_common import accounts as a
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_director import embedded

PASSWORD = "correct horse battery"
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FIELDLAB_ENDPOINT", "FIELDLAB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


class Told:
    """A transport that answers the same to everything, and keeps what was asked."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked = answer, list[Request]()

    def send(self, request: Request) -> Answer:
        self.asked.append(request)
        return self.answer

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        yield Stream(self.answer, iter(()))

    def close(self) -> None:
        pass


def problem(status: int, code: str, **details: object) -> Answer:
    body = {"title": "t", "status": status, "code": code, "detail": "The token expired on X.", "details": details}
    return Answer(status=status, headers={"content-type": p.PROBLEM}, body=json.dumps(body).encode())


MADE = a.NewToken(token="flu_new", id="1", user="ada", role="member", scope="admin", expires=1_900_000_000.0)


def test_a_login_is_kept_and_used_by_every_client_from_then_on() -> None:
    told = Told(Answer(status=201, headers=JSON, body=wire.dumps(MADE)))
    client = fl.Client.login("https://lab.test:8420/", "ada", PASSWORD, transport=told)
    assert "authorization" not in told.asked[0].headers
    assert json.loads(told.asked[0].body or b"")["password"] == PASSWORD
    kept = fl.profiles()
    assert [(one.name, one.user, one.token) for one in kept] == [("lab.test:8420", "ada", "flu_new")]
    assert "2030-03-17" in repr(kept)
    told.answer = Answer(status=200, headers=JSON, body=wire.dumps(a.Principal(user="ada", role="member")))
    for one in (client, fl.Client(transport=told), fl.Client("https://lab.test:8420", transport=told)):
        one.whoami()
        assert told.asked[-1].headers["authorization"] == "Bearer flu_new"
    assert not any(PASSWORD in path.read_text() for path in Path.home().rglob("*.toml"))


def test_a_second_director_is_kept_beside_the_first_and_can_be_made_current() -> None:
    told = Told(Answer(status=201, headers=JSON, body=wire.dumps(MADE)))
    fl.Client.login("https://one.test", "ada", PASSWORD, transport=told)
    fl.Client.login("https://two.test", "ada", PASSWORD, profile="second", transport=told)
    fl.Client.login("https://two.test", "bob", PASSWORD, transport=told)
    assert [(one.name, one.user) for one in fl.profiles()] == [("one.test", "ada"), ("second", "bob")]
    assert fl.Client(transport=told).endpoint == "https://two.test"
    fl.profiles().use("one.test")
    assert fl.Client(transport=told).endpoint == "https://one.test"


def test_an_expired_token_says_when_and_how_to_log_in_again() -> None:
    told = Told(Answer(status=201, headers=JSON, body=wire.dumps(MADE)))
    client = fl.Client.login("https://lab.test", "ada", PASSWORD, transport=told)
    told.answer = problem(401, "unauthenticated", expired=1.0)
    with pytest.raises(fl.AuthenticationError) as caught:
        client.whoami()
    assert "expired on X" in str(caught.value)
    assert "fl.Client.login('https://lab.test', 'ada')" in str(caught.value)
    told.answer = problem(401, "unauthenticated")
    with pytest.raises(fl.AuthenticationError) as caught:
        client.whoami()
    assert "fl.Client.login(" not in str(caught.value)


def test_a_password_goes_to_no_address_unencrypted() -> None:
    told = Told(problem(401, "unauthenticated"))
    with pytest.raises(fl.ConfigurationError, match="unencrypted"):
        fl.Client.login("http://lab.test", "ada", PASSWORD, transport=told)
    assert not told.asked


def test_a_login_that_fails_leaves_what_was_kept() -> None:
    told = Told(Answer(status=201, headers=JSON, body=wire.dumps(MADE)))
    fl.Client.login("https://lab.test", "ada", PASSWORD, transport=told)
    told.answer = problem(401, "unauthenticated")
    with pytest.raises(fl.AuthenticationError):
        fl.Client.login("https://lab.test", "ada", "wrong password", transport=told)
    assert fl.profiles()[0].token == "flu_new"


def test_where_nobody_can_be_asked_for_a_password_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(fl.ConfigurationError, match="nobody to ask"):
        fl.Client.login("https://lab.test", "ada")
    assert ask_password("Password: ", asked=lambda prompt: prompt + "x") == "Password: x"


# --- with a real director ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def director(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with embedded(tmp_path_factory.mktemp("director")) as running:
        with fl.Client(running.url, running.token) as admin:
            admin._session.call("add_user", a.UserInfo, body=a.AddUser(name="ada", password=PASSWORD))
        yield running


def test_a_user_logs_in_makes_a_token_for_a_script_and_logs_out(director: Any) -> None:
    client = fl.Client.login(director.url, "ada", PASSWORD)
    assert "ada, member" in repr(client.whoami())
    made = client.tokens.create("script", scope="read", expires="1h")
    assert made.token not in repr(made)
    assert [one.label for one in client.tokens.list() if not one.login] == ["script"]
    script = fl.Client(director.url, made.token)
    assert script.whoami().scope == "read"
    with pytest.raises(fl.PermissionDenied, match="wider scope"):
        script.tokens.create()
    client.tokens.revoke(made.id)
    with pytest.raises(fl.AuthenticationError, match="revoked"):
        script.whoami()
    client.logout()
    assert fl.profiles()[0].token is None
    with pytest.raises(fl.AuthenticationError, match="no token"):
        fl.Client().whoami()


def test_a_user_changes_the_password(director: Any) -> None:
    client = fl.Client.login(director.url, "ada", PASSWORD)
    with pytest.raises(fl.InvalidRequest, match="current password is wrong"):
        client.change_password("wrong password", "another password")
    client.change_password(PASSWORD, "another password")
    client.whoami()
    with pytest.raises(fl.AuthenticationError):
        fl.Client.login(director.url, "ada", PASSWORD)
    fl.Client.login(director.url, "ada", "another password").change_password("another password", PASSWORD)
