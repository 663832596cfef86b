"""Who may ask what: every endpoint of the table, with every kind of caller, each answer stated.

A new endpoint needs a row in ``MATRIX``, and in ``REQUESTS`` what a good request for it is. Everything is asked about
the things of one member, ``owner``: others, with the owner's request, get the answer for what does not exist.
"""

import itertools
import re
from dataclasses import replace

import pytest
from fieldlab_common.accounts import Role, Scope
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.protocol import ENDPOINTS
from fieldlab_common.wire import dumps
from fieldlab_director.services.accounts import add_user, create_token
from fieldlab_director.services.identity import executor_token
from fieldlab_director.store import schema

# Whose token asks. The answers' statuses stand below each other; "." is 401, "!" is 403, "-" is 404, "x" is 409.
#   none: no token. expired, revoked: tokens of the owner. viewer: one who owns such an experiment and became a viewer.
#   read, run: the owner's tokens of these scopes. owner: the owner's, of scope admin. other: another member.
#   admin: an admin, to whom what is another's does not exist either.
#   live: the executor of the owner's deployment. foreign: of another's. older: of an older launch of the same.
#   ended: its deployment has ended, and not everything is here. drained: everything is. over: it ended 8 days ago.
_USERS = ["none", "expired", "revoked", "viewer", "read", "run", "owner", "other", "admin"]
_EXECUTORS = ["live", "foreign", "older", "ended", "drained", "over"]
COLUMNS = [*_USERS, *_EXECUTORS, "agent"]
#   agent: a machine that joined an infrastructure of the owner's.
MATRIX = """
                        none exp  rev | view read run  owner other admin | live foreign older ended drained over | agent
health                  200  200  200 | 200  200  200  200   200   200   | 200  200     200   200   200     200  | 200
executable              200  200  200 | 200  200  200  200   200   200   | 200  200     200   200   200     200  | 200
login                   .    .    .   | .    .    .    .     .     .     | .    .       .     .     .       .    | .
logout                  .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
change_password         .    .    .   | x    !    !    x     x     x     | !    !       !     !     .       .    | !
tokens                  .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
create_token            .    .    .   | 201  !    !    201   201   201   | !    !       !     !     .       .    | !
revoke_token            .    .    .   | -    !    !    200   -     -     | !    !       !     !     .       .    | !
users                   .    .    .   | !    !    !    !     !     200   | !    !       !     !     .       .    | !
add_user                .    .    .   | !    !    !    !     !     201   | !    !       !     !     .       .    | !
change_user             .    .    .   | !    !    !    !     !     200   | !    !       !     !     .       .    | !
remove_user             .    .    .   | !    !    !    !     !     200   | !    !       !     !     .       .    | !
whoami                  .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
nodes                   .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
infrastructures         .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
attach_infrastructure   .    .    .   | !    !    201  201   201   201   | !    !       !     !     .       .    | !
detach_infrastructure   .    .    .   | !    !    200  200   -     -     | !    !       !     !     .       .    | !
check_infrastructure    .    .    .   | !    !    200  200   -     -     | !    !       !     !     .       .    | !
share_infrastructure    .    .    .   | !    !    200  200   -     -     | !    !       !     !     .       .    | !
unshare_infrastructure  .    .    .   | !    !    200  200   -     -     | !    !       !     !     .       .    | !
join_token              .    .    .   | !    !    201  201   -     -     | !    !       !     !     .       .    | !
agents                  .    .    .   | -    200  200  200   -     -     | !    !       !     !     .       .    | !
remove_agent            .    .    .   | !    !    200  200   -     -     | !    !       !     !     .       .    | !
join                    201  201  201 | 201  201  201  201   201   201   | 201  201     201   201   201     201  | 201
authority               -    -    -   | -    -    -    -     -     -     | -    -       -     -     -       -    | -
agent_poll              .    .    .   | !    !    !    !     !     !     | !    !       !     !     .       .    | 200
agent_answers           .    .    .   | !    !    !    !     !     !     | !    !       !     !     .       .    | 200
renew_agent             .    .    .   | !    !    !    !     !     !     | !    !       !     !     .       .    | 200
secrets                 .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
put_secret              .    .    .   | !    !    200  200   200   200   | !    !       !     !     .       .    | !
delete_secret           .    .    .   | !    !    200  200   -     -     | !    !       !     !     .       .    | !
missing_blobs           .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
blob_status             .    .    .   | 200  200  200  200   200   200   | 200  -       200   200   .       .    | !
get_blob                .    .    .   | 200  200  200  200   -     -     | 200  -       !     !     .       .    | !
put_blob                .    .    .   | !    !    200  200   200   200   | 200  -       200   200   .       .    | !
submit                  .    .    .   | !    !    202  202   -     -     | !    !       !     !     .       .    | !
experiments             .    .    .   | 200  200  200  200   200   200   | !    !       !     !     .       .    | !
experiment              .    .    .   | 200  200  200  200   -     -     | !    !       !     !     .       .    | !
start                   .    .    .   | !    !    202  202   -     -     | !    !       !     !     .       .    | !
cancel                  .    .    .   | !    !    202  202   -     -     | !    !       !     !     .       .    | !
rerun                   .    .    .   | !    !    202  202   -     -     | !    !       !     !     .       .    | !
delete_experiment       .    .    .   | !    !    x    x     -     -     | !    !       !     !     .       .    | !
records                 .    .    .   | 200  200  200  200   -     -     | !    !       !     !     .       .    | !
events                  .    .    .   | 200  200  200  200   -     -     | !    !       !     !     .       .    | !
send_event              .    .    .   | !    !    201  201   -     -     | !    !       !     !     .       .    | !
artifacts               .    .    .   | 200  200  200  200   -     -     | !    !       !     !     .       .    | !
claim                   .    .    .   | !    !    !    !     !     !     | 200  x       x     x     .       .    | !
report                  .    .    .   | !    !    !    !     !     !     | 200  x       200   200   .       .    | !
poll                    .    .    .   | !    !    !    !     !     !     | 200  x       x     200   .       .    | !
"""
SHORT = {".": 401, "!": 403, "-": 404, "x": 409}
EXPECTED = {
    words[0]: dict(zip(COLUMNS, [SHORT.get(word) or int(word) for word in words[1:] if word != "|"], strict=True))
    for words in map(str.split, MATRIX.splitlines()[2:])
}
_attached = itertools.count()

# What a good request for an endpoint is, where it is not an empty one: of what ``Scene`` has.
REQUESTS = {
    "attach_infrastructure": lambda s: {
        "json": {"name": f"lab-{next(_attached)}", "spec": {"kind": "fleet", "body": {"nodes": []}}}
    },
    "login": lambda s: {"json": {"user": f"nobody-{next(_attached)}", "password": "wrong"}},
    "change_password": lambda s: {"json": {"current": "none was set", "new": "a new password"}},
    "add_user": lambda s: {"json": {"name": f"new-{next(_attached)}"}},
    "join": lambda s: {"json": {"token": s.join_token(), "node": {"name": "machine"}}},
    "agent_poll": lambda s: {"json": {"instance": "first"}},
    "put_secret": lambda s: {"json": {"value": "hush"}},
    "missing_blobs": lambda s: {"json": {"digests": [s.private]}},
    "put_blob": lambda s: {"content": b"artifact", "params": {"offset": 0, "size": 8}},
    "submit": lambda s: {"content": s.submission},
    "records": lambda s: {"params": {"lane": "control"}},
    "send_event": lambda s: {"json": {"name": "go"}},
    "claim": lambda s: {"json": {"journal_id": s.journal, "epoch": s.epoch}},
    "report": lambda s: {"content": b"", "params": {"lane": "control", "journal": s.journal}},
    "poll": lambda s: {"params": {"journal": s.journal}},
}


class Scene:
    """The things of one member, and a client for each column."""

    journal = "j1"
    epoch = 1

    def __init__(self, lab, make_user):
        self.lab = lab
        self.ada, self.bob, self.vera = (make_user(name) for name in ("ada", "bob", "vera"))
        self.private, self.graph, self.artifact = map(self.ada.put, (b"private", b"graph", b"artifact"))
        self.experiment = self.ada.experiment(deployments=("live", "older", "ended", "drained", "over"))
        request = self.ada.request("another", if_exists="new")
        spec = replace(request.deployments[0], graph=self.private)
        self.submission = dumps(replace(request, deployments=(spec,)))
        self.ada.http.post(
            "/v1/infrastructures", json={"name": "owned", "spec": {"kind": "agents", "body": {"nodes": []}}}
        )
        self.clients = {"none": lab.client(), **self._users(), **self._executors(), "agent": self._join("machine")}
        self.vera.put(b"private")
        self.hers = self.vera.experiment("hers")
        self.vera.become(Role.VIEWER)
        self.bob.become(Role.MEMBER)
        self.ada.become(Role.MEMBER)

    def _users(self):
        tokens = {name: self._token(scope=scope) for name, scope in (("read", Scope.READ), ("run", Scope.RUN))}
        tokens["expired"] = self._token(expires=1.0)
        tokens["revoked"] = self._token()
        self._set(schema.tokens, tokens["revoked"].split("_")[1], revoked=1.0)
        return {
            **{name: self.lab.client(token) for name, token in tokens.items()},
            "owner": self.ada.http,
            "viewer": self.vera.http,
            "other": self.bob.http,
            "admin": self.lab.user(f"admin-{next(_attached)}", "admin"),
        }

    def _token(self, **values):
        return self.lab.write(lambda tx: create_token(tx, self.ada.name, **values).token)

    def _executors(self):
        found = {}
        for name in ("live", "older", "ended", "drained", "over"):
            executor = self.lab.launch(self.experiment, name)
            executor.claim()
            executor.report((1, "artifact", {"step": "s", "name": "t", "size": 8, "sha256": self.artifact}))
            found[name] = executor.http
        self.lab.launch(self.experiment, "older", epoch=2)
        now = self.lab.write(lambda tx: tx.now)
        for name, days in (("ended", 6), ("drained", 6), ("over", 8)):
            row = self.lab.move(self.lab.row(self.experiment, name), D.LOST)
            self._set(schema.deployments, row.id, ended=now - days * 86_400.0, drained=name == "drained")
        foreign = self.lab.launch(self.bob.experiment("theirs"))
        foreign.journal = "j9"
        foreign.claim()
        return {**found, "foreign": foreign.http}

    def _to_be_detached(self):
        machines = {"name": f"going-{next(_attached)}", "spec": {"kind": "agents", "body": {"nodes": []}}}
        return self.ada.http.post("/v1/infrastructures", json=machines).json()["name"]

    def join_token(self):
        return self.ada.http.post("/v1/infrastructures/owned/join-tokens", json={}).json()["token"]

    def _join(self, name):
        joining = {"token": self.join_token(), "node": {"name": name}}
        return self.lab.client(self.lab.client().post("/v1/agents", json=joining).json()["credential"])

    def _set(self, table, key, **values):
        self.lab.write(lambda tx: tx.execute(table.update().where(table.c.id == key).values(**values)))

    def _guest(self):
        """A user whom a column may remove."""
        name = f"guest-{next(_attached)}"
        self.lab.write(lambda tx: add_user(tx, name))
        return name

    def _again(self, column):
        """A client like the column's, which may log out."""
        header = self.clients[column].headers.get("authorization", "")
        if not header.startswith("Bearer flu_") or column in ("expired", "revoked"):
            return self.clients[column]
        asked = self.clients[column].get("/v1/me").json()
        made = self.lab.write(lambda tx: create_token(tx, asked["user"], scope=Scope(asked["scope"])))
        return self.lab.client(made.token)

    def _digest(self, row, column):
        if column in _EXECUTORS:
            return self.graph if row.name == "get_blob" and column != "foreign" else self.artifact
        return self.artifact if row.name == "put_blob" else self.private

    def ask(self, row, column, **path):
        """The answer of an endpoint to the caller of a column; ``path`` has what is asked about instead."""
        if row.name == "delete_secret":  # an earlier column may have done it
            assert self.ada.http.put("/v1/secrets/owned", json={"value": "hush"}).status_code == 200
        client = self._again(column) if row.name == "logout" else self.clients[column]
        if row.name == "remove_agent" and EXPECTED[row.name][column] == 200:
            self._join("owned")
        experiment = self.hers if column == "viewer" else self.experiment
        told = {
            "experiment": experiment,
            "infrastructure": self._to_be_detached() if row.name == "detach_infrastructure" else "owned",
            "agent": "owned",
            "secret": "owned" if row.name == "delete_secret" else "key",
            "digest": self._digest(row, column),
            **({"token": self._token().split("_")[1]} if row.name == "revoke_token" else {}),
            **({"user": self._guest()} if "{user}" in row.path else {}),
            **path,
        }
        filled = re.sub(r"{(\w+)}", lambda m: told[m[1]], row.path)
        request = REQUESTS.get(row.name, lambda scene: {} if row.request is None else {"json": {}})
        return client.request(row.method, filled, **request(self))


@pytest.fixture(scope="module")
def scene(lab, make_user):
    return Scene(lab, make_user)


def test_every_endpoint_has_a_row():
    assert list(EXPECTED) == list(ENDPOINTS)


@pytest.mark.parametrize("row", ENDPOINTS.values(), ids=lambda row: row.name)
def test_every_caller_gets_the_answer_that_is_stated(scene, row):
    answers = {column: scene.ask(row, column).status_code for column in COLUMNS}
    assert answers == EXPECTED[row.name]


ABSENT = {
    "token": "1" * 20,
    "user": "nobody-of-that-name",
    "infrastructure": "no-such",
    "agent": "no-such",
    "experiment": "0" * 20,
    "digest": "0" * 64,
    "secret": "no-such",
}


@pytest.mark.parametrize("row", [row for row in ENDPOINTS.values() if "{" in row.path], ids=lambda row: row.name)
def test_what_is_anothers_answers_as_what_does_not_exist(scene, row):
    def answer(column, **path):
        told = scene.ask(row, column, **path)
        text = told.text.replace(told.headers["x-request-id"], "")
        return told.status_code, re.sub("|".join(ABSENT.values()), "owned", text)  # what was asked may be repeated

    for column in COLUMNS:
        if EXPECTED[row.name][column] == 404:
            assert answer(column) == answer(column, **ABSENT)


def test_an_executor_is_told_why_its_token_is_not_good_any_more_and_nobody_else_is(scene):
    row = ENDPOINTS["poll"]
    assert scene.ask(row, "drained").json()["code"] == "drained"
    assert "more than 7 days ago" in scene.ask(row, "over").json()["detail"]
    forged = scene.lab.client(executor_token(b"another key", scene.lab.row(scene.experiment, "drained").id, 1))
    assert forged.get(row.path, params={"journal": "j1"}).json()["detail"] == "The token is not valid."


def test_an_executor_whose_deployment_was_given_up_is_told_to_stop_and_no_events(scene):
    told = scene.ask(ENDPOINTS["poll"], "ended").json()
    assert told["cancel"] is not None
    assert told["events"] == []
