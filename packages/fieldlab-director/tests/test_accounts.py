"""Users, logins and tokens: over HTTP, on the command line, and the brake on guessing."""

import asyncio
import io
import itertools
import threading

import pytest
from fieldlab_common.accounts import Role, Scope
from fieldlab_common.errors import InvalidRequest
from fieldlab_director.__main__ import main
from fieldlab_director.services import accounts
from fieldlab_director.services.passwords import Passwords, hash_password, network_of
from fieldlab_director.services.quotas import Brake
from fieldlab_director.store import schema

PASSWORD = "correct horse battery"
HASHED = hash_password(PASSWORD)
_count = itertools.count()


@pytest.fixture
def erin(lab):
    """The name of a member with a password."""
    name = f"erin-{next(_count)}"
    lab.write(lambda tx: accounts.add_user(tx, name, password=HASHED))
    return name


@pytest.fixture(autouse=True)
def no_brake(lab, monkeypatch):
    """Tests share an address: what one spent on it must not brake the next."""
    for brake in ("_of_user", "_of_address"):
        monkeypatch.setattr(lab.desk, brake, Brake(1000, every=1.0))


def login(lab, user, password=PASSWORD, **more):
    return lab.client().post("/v1/login", json={"user": user, "password": password, **more})


def logged_in(lab, user, password=PASSWORD):
    return lab.client(login(lab, user, password).json()["token"])


def code(answer):
    return answer.status_code, answer.json().get("code")


# --- logging in ------------------------------------------------------------------------------------------------------


def test_a_login_gives_a_token_that_expires_and_is_for_everything_that_the_user_may(lab, erin):
    made = login(lab, erin).json()
    me = lab.client(made["token"]).get("/v1/me").json()
    assert (me["user"], me["role"], me["scope"]) == (erin, "member", "admin")
    assert me["expires"] == made["expires"] > lab.write(lambda tx: tx.now)


@pytest.mark.parametrize("user", ["erin", "nobody", "no name at all, at length " * 9, "tokens-only"])
def test_a_wrong_name_a_wrong_password_and_a_user_without_one_get_the_same_answer(lab, erin, user):
    if user == "tokens-only":
        lab.write(lambda tx: accounts.add_user(tx, f"{user}-{next(_count)}"))
    answers = [login(lab, erin, "wrong password").json(), login(lab, erin if user == "erin" else user, "wrong").json()]
    for answer in answers:
        del answer["request_id"]
    assert answers[0] == answers[1]
    assert answers[0]["status"] == 401


def test_a_wrong_name_costs_the_same_hash_as_a_wrong_password(lab, erin, monkeypatch):
    verified = []
    monkeypatch.setattr(lab.desk.passwords, "_verify", lambda hashed, password: verified.append(hashed) or False)
    for user in (erin, "nobody"):
        assert login(lab, user, "wrong password").status_code == 401
    cost = [hashed.split("$")[1:4] for hashed in verified]
    assert cost == [HASHED.split("$")[1:4]] * 2


def test_after_too_many_attempts_the_user_waits_and_another_does_not(lab, erin, monkeypatch):
    monkeypatch.setattr(lab.desk, "_of_user", Brake(2, every=60.0))
    answers = [login(lab, erin, "wrong password") for _ in range(3)]
    assert [code(answer) for answer in answers] == [(401, "unauthenticated")] * 2 + [(429, "rate_limited")]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 60
    assert login(lab, erin).status_code == 429  # also with the right one: else guessing would go on
    assert login(lab, "nobody", "wrong password").status_code == 401


def test_after_too_many_attempts_an_address_waits_whoever_it_says_to_be(lab, erin, monkeypatch):
    monkeypatch.setattr(lab.desk, "_of_address", Brake(2, every=60.0))
    for name in ("a", "b"):
        login(lab, name, "wrong password")
    assert code(login(lab, erin)) == (429, "rate_limited")


def test_good_logins_are_not_counted(lab, erin, monkeypatch):
    monkeypatch.setattr(lab.desk, "_of_user", Brake(2, every=60.0))
    assert [login(lab, erin).status_code for _ in range(4)] == [201] * 4


def test_after_a_logout_the_token_is_not_good_and_others_are(lab, erin):
    one, two = logged_in(lab, erin), logged_in(lab, erin)
    assert one.post("/v1/logout", json={}).status_code == 200
    answer = one.get("/v1/me")
    assert (*code(answer), answer.json()["detail"]) == (401, "unauthenticated", "The token was revoked.")
    assert two.get("/v1/me").status_code == 200


def test_a_new_password_ends_other_logins_and_no_token_that_was_made_on_purpose(lab, erin):
    here, there = logged_in(lab, erin), logged_in(lab, erin)
    script = lab.client(here.post("/v1/tokens", json={"label": "script"}).json()["token"])
    assert code(here.put("/v1/me/password", json={"current": "wrong", "new": "a" * 12})) == (422, "invalid_request")
    assert here.put("/v1/me/password", json={"current": PASSWORD, "new": "short"}).status_code == 422
    assert here.put("/v1/me/password", json={"current": PASSWORD, "new": "quite another one"}).status_code == 200
    assert [http.get("/v1/me").status_code for http in (here, there, script)] == [200, 401, 200]
    assert login(lab, erin).status_code == 401
    assert login(lab, erin, "quite another one").status_code == 201


def test_a_body_without_token_has_a_small_limit(lab):
    answer = lab.client().post("/v1/login", content=b'{"user": "' + b"x" * 20_000 + b'", "password": ""}')
    assert code(answer) == (413, "too_large")


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_is_shown_once_listed_without_its_text_and_revoked(lab, erin):
    http = logged_in(lab, erin)
    made = http.post("/v1/tokens", json={"label": "notebook", "scope": "read", "expires_in": 60}).json()
    listed = http.get("/v1/tokens")
    assert made["token"] not in listed.text
    assert [(one["label"], one["scope"]) for one in listed.json()["tokens"] if not one["login"]] == [
        ("notebook", "read")
    ]
    reader = lab.client(made["token"])
    assert reader.get("/v1/me").json()["scope"] == "read"
    assert http.delete(f"/v1/tokens/{made['id']}").status_code == 200
    assert reader.get("/v1/me").status_code == 401
    assert made["id"] not in http.get("/v1/tokens").text
    assert http.delete(f"/v1/tokens/{made['id']}").status_code == 404


def test_a_token_that_expired_says_so_to_who_holds_it_and_to_nobody_else(lab, erin):
    made = lab.write(lambda tx: accounts.create_token(tx, erin, expires=1.0))
    answer = lab.client(made.token).get("/v1/me")
    assert "expired on 1970-01-01" in answer.json()["detail"]
    assert answer.json()["details"] == {"expired": 1.0}
    guessed = f"flu_{made.id}_{'A' * 43}"
    assert lab.client(guessed).get("/v1/me").json()["detail"] == "The token is not valid."


@pytest.mark.parametrize("wish", [{"expires_in": 0}, {"expires_in": 1e12}, {"label": "x" * 101}, {"scope": "all"}])
def test_a_token_that_cannot_be_is_refused(lab, erin, wish):
    assert code(logged_in(lab, erin).post("/v1/tokens", json=wish)) == (422, "invalid_request")


def test_a_user_has_so_many_tokens_and_no_more(lab, erin, monkeypatch):
    monkeypatch.setattr(accounts, "MOST_TOKENS", 4)
    http = logged_in(lab, erin)
    answers = [http.post("/v1/tokens", json={}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [201, 201, 201, 413]
    assert [login(lab, erin).status_code for _ in range(3)] == [413] * 3


def test_who_logs_in_all_the_time_keeps_the_newest_logins(lab, erin, monkeypatch):
    monkeypatch.setattr(accounts, "MOST_TOKENS", 4)
    clients = [logged_in(lab, erin) for _ in range(6)]
    assert [http.get("/v1/me").status_code for http in clients] == [401] * 4 + [200] * 2


def test_a_token_that_ends_while_its_owner_waits_gets_no_answer(lab, ada):
    experiment = ada.experiment()
    cursor = ada.http.get(f"/v1/experiments/{experiment}/events").json()["cursor"]
    made = lab.write(lambda tx: accounts.create_token(tx, ada.name, expires=tx.now + 2))
    query = {"after": cursor, "wait": 2.5}
    answer = lab.client(made.token).get(f"/v1/experiments/{experiment}/events", params=query)
    assert code(answer) == (401, "unauthenticated")


# --- users -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(lab):
    """An admin's client."""
    return lab.user(f"root-{next(_count)}", "admin")


def test_an_admin_makes_changes_and_removes_users(lab, root):
    name = f"fred-{next(_count)}"
    made = root.post("/v1/users", json={"name": name, "role": "viewer", "password": PASSWORD}).json()
    assert (made["role"], made["password"], made["disabled"]) == ("viewer", True, False)
    assert code(root.post("/v1/users", json={"name": name})) == (409, "illegal_state")
    fred = logged_in(lab, name)
    assert fred.put("/v1/secrets/k", json={"value": "x"}).status_code == 403
    assert root.patch(f"/v1/users/{name}", json={"role": "member"}).json()["role"] == "member"
    assert fred.put("/v1/secrets/k", json={"value": "x"}).status_code == 200
    assert name in [user["name"] for user in root.get("/v1/users").json()["users"]]
    assert root.delete(f"/v1/users/{name}").status_code == 200
    assert fred.get("/v1/me").status_code == 401
    assert code(root.patch(f"/v1/users/{name}", json={})) == (404, "not_found")


def test_a_disabled_user_cannot_log_in_nor_use_a_token_until_enabled(lab, root, erin):
    http = logged_in(lab, erin)
    root.patch(f"/v1/users/{erin}", json={"disabled": True})
    assert "is disabled" in http.get("/v1/me").json()["detail"]
    assert "is disabled" in login(lab, erin).json()["detail"]
    root.patch(f"/v1/users/{erin}", json={"disabled": False})
    assert http.get("/v1/me").status_code == 200


def test_with_a_user_all_that_is_the_users_goes_and_nothing_of_others(lab, root, ada, bob):
    theirs = bob.experiment()
    ada.http.put("/v1/secrets/k", json={"value": "x"})
    experiment = ada.experiment()
    refused = root.delete(f"/v1/users/{ada.name}")
    assert code(refused) == (409, "illegal_state")
    assert "exp" in refused.json()["detail"]
    lab.finish(experiment)
    assert root.delete(f"/v1/users/{ada.name}").status_code == 200
    for table in (schema.experiments, schema.secrets, schema.infrastructures, schema.tokens):
        column = table.c.user_id if table is schema.tokens else table.c.owner_id
        owners = lab.write(lambda tx, c=column: tx.all(c.table.select().with_only_columns(c), lambda **row: row))
        assert ada.name not in str(owners)
    assert bob.http.get(f"/v1/experiments/{theirs}").status_code == 200
    assert ada.http.get("/v1/me").status_code == 401


def test_a_user_on_whose_nodes_others_have_results_is_not_removed(lab, root, ada, bob):
    experiment = bob.experiment()
    lab.finish(experiment)
    place = lab.write(
        lambda tx: tx.value(
            schema.infrastructures.select()
            .with_only_columns(schema.infrastructures.c.id)
            .join(schema.users, schema.users.c.id == schema.infrastructures.c.owner_id)
            .where(schema.users.c.name == ada.name)
        )
    )
    moved = schema.deployments.update().where(schema.deployments.c.experiment_id == experiment)
    lab.write(lambda tx: tx.execute(moved.values(infrastructure_id=place)))
    assert code(root.delete(f"/v1/users/{ada.name}")) == (409, "illegal_state")


def test_the_last_admin_stays_one(lab, tmp_path, capsys):
    data = str(tmp_path / "d")
    assert main(["user", "add", "root", "--role", "admin", "--no-password", "--data", data]) == 0
    for words in (["role", "root", "member"], ["disable", "root"], ["remove", "root"]):
        assert main(["user", words[0], *words[1:], "--data", data]) == 1
        assert "only admin" in capsys.readouterr().err


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_does_what_an_admin_needs(tmp_path, capsys, monkeypatch):
    data = ["--data", str(tmp_path / "d")]

    def run(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = main([*words, *data])
        said = capsys.readouterr()
        return status, said.out + said.err

    assert run("user", "add", "root", "--role", "admin", stdin=f"{PASSWORD}\n")[0] == 0
    assert run("user", "add", "eve", "--no-password")[0] == 0
    assert run("user", "add", "eve", "--no-password") == (
        1,
        "fieldlab-director: There is a user 'eve' already. Choose another name.\n",
    )
    assert run("user", "add", "dan", stdin="short\n")[0] == 1
    token = run("token", "create", "eve", "--label", "ci", "--scope", "read", "--expires", "90d")[1].strip()
    assert token.startswith("flu_")
    listed = run("token", "list", "eve")[1]
    assert token.split("_")[1] in listed
    assert token not in listed
    assert run("token", "revoke", "eve", token.split("_")[1])[0] == 0
    assert "ci" not in run("token", "list", "eve")[1]
    assert run("user", "disable", "eve")[0] == 0
    assert run("user", "password", "eve", stdin=f"{PASSWORD}\n")[0] == 0
    rows = [line.split() for line in run("user", "list")[1].splitlines()]
    assert rows[1:] == [["eve", "member", "disabled", "password"], ["root", "admin", "enabled", "password"]]
    assert run("user", "enable", "eve")[0] == 0
    assert run("user", "role", "eve", "viewer")[0] == 0
    assert run("user", "remove", "eve")[0] == 0
    assert "eve" not in run("user", "list")[1]


@pytest.mark.parametrize("words", [["user", "list"], ["token", "create", "eve"], ["gc"], ["migrate"], ["backup", "b"]])
def test_a_command_about_a_folder_that_is_no_directors_says_so_and_makes_none(tmp_path, capsys, words):
    assert main([*words, "--data", str(tmp_path / "typo")]) == 1
    assert "There is no director's data in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_user_may_be_there_before_the_first_start_and_that_it_is_one_is_said(tmp_path, capsys):
    for name, new in (("eve", True), ("dan", False)):
        assert main(["user", "add", name, "--no-password", "--data", str(tmp_path / "d")]) == 0
        assert ("it was made, too" in capsys.readouterr().out) is new


def test_no_token_is_made_on_the_command_line_that_is_good_for_no_time(tmp_path, capsys):
    data = ["--data", str(tmp_path / "d")]
    main(["user", "add", "eve", "--no-password", *data])
    for lasts in ("0d", "11000d", ""):
        assert main(["token", "create", "eve", "--expires", lasts, *data]) == 1
    assert "flu_" not in capsys.readouterr().out


# --- the parts -------------------------------------------------------------------------------------------------------


def test_a_password_is_known_again_and_no_other():
    passwords = Passwords()

    async def check(hashed, password):
        return await passwords.check(hashed, password)

    assert HASHED.startswith("$argon2id$")
    assert asyncio.run(check(HASHED, PASSWORD))
    assert not asyncio.run(check(HASHED, "correct house battery"))
    assert not asyncio.run(check(None, PASSWORD))
    assert not asyncio.run(check("rubbish", PASSWORD))
    for password in ("123456789", "x" * 1025):
        with pytest.raises(InvalidRequest):
            hash_password(password)


def test_no_more_hashes_are_computed_or_waited_for_than_fit(monkeypatch):
    monkeypatch.setattr("fieldlab_director.services.passwords.WAITING", 3)
    going, most, go = [], [], threading.Event()

    def verify(hashed, password):
        going.append(1)
        most.append(len(going))
        go.wait(20)
        going.pop()
        return True

    async def many():
        passwords = Passwords(verify)
        tries = [asyncio.ensure_future(passwords.check(HASHED, PASSWORD)) for _ in range(8)]
        await asyncio.wait(tries, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        go.set()
        return await asyncio.gather(*tries, return_exceptions=True)

    found = asyncio.run(many())
    assert [value for value in found if value is True] == [True] * 5
    assert {type(value).__name__ for value in found if value is not True} == {"Unavailable"}
    assert max(most) <= 2


def test_a_brake_lets_a_burst_through_then_one_by_one_and_forgets():
    now = [0.0]
    brake = Brake(3, every=10.0, most=2, clock=lambda: now[0])
    assert [brake.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 10.0]
    now[0] = 10.0
    assert [brake.take("a") for _ in range(2)] == [0.0, 10.0]
    brake.forgive("a")
    assert brake.take("a") == 0.0
    assert [brake.take("b"), brake.take("c")] == [0.0, 0.0]  # the one that is free first makes room
    assert len(brake._free_at) == 2


def test_what_is_heavier_than_a_burst_passes_a_brake_that_is_rested():
    now = [0.0]
    brake = Brake(3, every=10.0, clock=lambda: now[0])
    assert [brake.take("a", 9), brake.take("a", 1)] == [0.0, 70.0]
    now[0] = 70.0
    assert [brake.take("a", 1), brake.take("a", 9)] == [0.0, 30.0]


def test_an_address_of_ipv6_counts_with_its_network():
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff") != network_of("2001:db8:1::1")
    assert network_of("192.0.2.1") != network_of("192.0.2.2")
    assert network_of("nonsense") == "nonsense"


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("scope", Scope)
def test_a_token_may_no_more_than_its_scope_and_its_user(lab, role, scope):
    name = f"gina-{next(_count)}"
    lab.write(lambda tx: accounts.add_user(tx, name, role=role))
    http = lab.client(lab.write(lambda tx: accounts.create_token(tx, name, scope=scope)).token)
    powers = http.get("/v1/nodes"), http.put("/v1/secrets/k", json={"value": "x"}), http.get("/v1/users")
    least = min(list(Role).index(role), list(Scope).index(scope))
    assert [answer.status_code for answer in powers] == [200 if least >= rank else 403 for rank in range(3)]
