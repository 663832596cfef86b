"""Infrastructures among users: who may use one, how it is shared, and how it is let go."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fieldlab_common.accounts import Role
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_director.services import infrastructures
from fieldlab_director.store import schema

_named = itertools.count()


class People:
    """An owner with an infrastructure of one node, and another user."""

    def __init__(self, lab: Any, make_user: Any) -> None:
        self.lab = lab
        self.owner, self.other = make_user("owner"), make_user("other")
        self.owner.become(Role.MEMBER)
        self.other.become(Role.MEMBER)
        self.node = f"lent-{next(_named)}"
        self.name = f"lab-{self.node}"

    def attach(self, **more: Any) -> Any:
        spec = {"kind": "fleet", "body": {"nodes": [self.node]}}
        return self.owner.http.post("/v1/infrastructures", json={"name": self.name, "spec": spec, **more})

    def share(self, user: str) -> Any:
        return self.owner.http.put(f"/v1/infrastructures/{self.name}/access/{user}", json={})

    def unshare(self, user: str) -> Any:
        return self.owner.http.delete(f"/v1/infrastructures/{self.name}/access/{user}")

    def detach(self, **query: Any) -> Any:
        return self.owner.http.delete(f"/v1/infrastructures/{self.name}", params=query)

    def check(self) -> Any:
        return self.owner.http.post(f"/v1/infrastructures/{self.name}/check", json={})

    def sees(self, user: Any) -> bool:
        nodes = {node["name"] for node in user.http.get("/v1/nodes").json()["nodes"]}
        listed = {one["name"] for one in user.http.get("/v1/infrastructures").json()["infrastructures"]}
        assert (self.node in nodes) is (self.name in listed)
        return self.node in nodes

    def submit(self, user: Any) -> Any:
        spec = {"name": "a", "node": self.node, "environment": {"kind": "host"}, "graph": user.put(b"{}")}
        return user.http.post("/v1/experiments", json={"name": f"e{next(_named)}", "deployments": [spec]})

    def info(self, user: Any) -> Any:
        listed = user.http.get("/v1/infrastructures").json()["infrastructures"]
        return next(one for one in listed if one["name"] == self.name)


@pytest.fixture
def people(lab: Any, make_user: Any) -> People:
    return People(lab, make_user)


def test_what_a_member_attaches_is_that_members_alone(people: People) -> None:
    assert people.attach().status_code == 201
    assert (people.sees(people.owner), people.sees(people.other)) == (True, False)
    assert people.submit(people.other).status_code == 404
    assert people.submit(people.owner).status_code == 202


def test_what_an_admin_attaches_is_for_everybody_unless_users_are_named(people: People) -> None:
    people.owner.become(Role.ADMIN)
    assert people.attach().json()["access"] == ["*"]
    assert people.sees(people.other)
    assert people.submit(people.other).status_code == 202
    assert people.unshare("*").json()["access"] == []
    assert not people.sees(people.other)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("local", {}),
        ("docker", {}),
        ("docker", {"engine": "unix:///run/docker.sock"}),
        ("docker", {"engine": "tcp://engine:2376"}),
    ],
)
def test_the_directors_machine_and_engines_are_for_admins(people: People, kind: str, body: dict[str, str]) -> None:
    spec = {"kind": kind, "body": {"nodes": [people.node], **body}}
    given = {"json": {"name": people.name, "spec": spec}}
    assert people.owner.http.post("/v1/infrastructures", **given).status_code == 403
    people.owner.become(Role.ADMIN)
    assert people.owner.http.post("/v1/infrastructures", **given).status_code == 201


@pytest.mark.parametrize(("access", "seen"), [([], False), (["other"], True)])
def test_who_attaches_says_who_may_use_it(people: People, access: list[str], seen: bool) -> None:
    people.owner.become(Role.ADMIN)
    named = [people.other.name if name == "other" else name for name in access]
    assert people.attach(access=named).json()["access"] == named
    assert people.sees(people.other) is seen


def test_what_is_shared_may_be_used_and_not_changed(people: People) -> None:
    people.attach()
    assert people.share(people.other.name).json()["access"] == [people.other.name]
    assert people.share(people.other.name).json()["access"] == [people.other.name]
    assert people.sees(people.other)
    assert people.submit(people.other).status_code == 202
    told = people.info(people.other)
    assert (told["owner"], told["access"]) == (people.owner.name, [])
    path = f"/v1/infrastructures/{people.name}"
    assert people.other.http.delete(path).status_code == 404
    assert people.other.http.put(f"{path}/access/{people.owner.name}", json={}).status_code == 404
    assert people.unshare(people.other.name).json()["access"] == []
    assert not people.sees(people.other)


def test_a_member_cannot_share_with_everybody_nor_with_nobody(people: People) -> None:
    people.attach()
    assert people.share("*").status_code == 403
    assert people.share("nobody-of-that-name").status_code == 404
    assert people.attach(access=["nobody-of-that-name"]).status_code == 409


def test_it_is_not_let_go_while_runs_use_it_and_names_them(people: People) -> None:
    people.attach()
    people.share(people.other.name)
    run = people.submit(people.owner).json()["name"]
    people.submit(people.other)
    refused = people.detach()
    assert (refused.status_code, refused.json()["code"]) == (409, "illegal_state")
    assert f"used by runs: {run}, 1 of others" in refused.json()["detail"]
    assert people.sees(people.owner)


def test_what_is_drained_takes_no_new_run_and_goes_with_the_last(people: People) -> None:
    people.attach()
    experiment = people.submit(people.owner).json()["id"]
    assert people.detach(drain=True).json()["state"] == "leaving"
    assert people.info(people.owner)["state"] == "leaving"
    assert people.submit(people.owner).status_code == 404
    assert people.lab.write(infrastructures.finish_detaching) is False
    row = people.lab.move(people.lab.row(experiment), D.PREPARING, D.FAILED)
    table = schema.deployments
    people.lab.write(
        lambda tx: tx.execute(table.update().where(table.c.id == row.id).values(look_at=infrastructures.NEVER))
    )
    assert people.lab.write(infrastructures.finish_detaching) is True
    assert not people.sees(people.owner)
    told = people.owner.http.get(f"/v1/experiments/{experiment}").json()
    assert [one["node"] for one in told["deployments"]] == [people.node]


def test_one_of_which_all_nodes_are_offline_is_unavailable_until_a_check_finds_one(people: People) -> None:
    people.lab.fleet.reason = "It did not let the director in."
    try:
        made = people.attach().json()
        refused = people.check()
    finally:
        people.lab.fleet.reason = ""
    assert (made["state"], made["message"]) == ("unavailable", "It did not let the director in.")
    assert [(line["node"], line["ok"]) for line in refused.json()["lines"]] == [(people.node, False)]
    assert people.info(people.owner)["state"] == "unavailable"
    assert [line["ok"] for line in people.check().json()["lines"]] == [True]
    assert people.info(people.owner)["state"] == "ready"
    (node,) = [one for one in people.owner.http.get("/v1/nodes").json()["nodes"] if one["name"] == people.node]
    assert node["availability"] == "available"


def test_addresses_of_users_are_looked_at_and_those_of_admins_are_not(people: People) -> None:
    people.attach()
    people.check()
    people.owner.become(Role.ADMIN)
    people.check()
    assert people.lab.fleet.trusted[-3:] == [False, False, True]


def test_it_says_where_its_executors_reach_the_director(people: People) -> None:
    assert (
        people.attach(director_url="https://d.example:8420/lab").json()["director_url"] == "https://d.example:8420/lab"
    )
    assert people.info(people.owner)["director_url"] == "https://d.example:8420/lab"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"director_url": "ftp://d.example"}, "$.director_url must be like https://"),
        ({"director_url": "https://ada:secret@d.example"}, "$.director_url must be like https://"),
        ({"director_url": "https://d.example:99999"}, "$.director_url must be like https://"),
        ({"director_url": "https://d.example/ or not"}, "$.director_url must be like https://"),
        ({"director_ca": "x"}, "$.director_ca is of a director_url"),
        (
            {"director_url": "https://d.example", "director_ca": "no certificate"},
            "$.director_ca must hold certificates",
        ),
        (
            {"director_url": "http://127.0.0.1:1", "spec": {"kind": "fleet", "body": {"nodes": [], "link": "tunnel"}}},
            "these have a tunnel",
        ),
    ],
)
def test_a_way_to_the_director_that_is_none_is_refused(people: People, more: dict[str, Any], said: str) -> None:
    refused = people.attach(**more)
    assert refused.status_code == 422, refused.text
    assert said in refused.json()["detail"]


def test_whom_it_is_shared_with_cannot_have_it_tried(people: People) -> None:
    people.attach()
    people.share(people.other.name)
    path = f"/v1/infrastructures/{people.name}/check"
    assert people.other.http.post(path, json={}).status_code == 404


def test_the_machine_of_another_director_is_not_tried_here(people: People) -> None:
    people.attach()
    table = schema.infrastructures
    people.lab.write(lambda tx: tx.execute(table.update().where(table.c.name == people.name).values(home="elsewhere")))
    assert (people.check().status_code, people.check().json()["code"]) == (409, "illegal_state")


def test_what_was_let_go_keeps_no_credentials_and_gives_its_name_back(people: People) -> None:
    people.attach()
    assert people.detach().json()["state"] == "detached"
    table = schema.infrastructures
    kept = people.lab.write(
        lambda tx: tx.all(table.select().where(table.c.name.startswith(people.name)), lambda **row: row)
    )
    assert [row["options"] for row in kept] == [b""]
    assert people.detach().status_code == 404
    assert people.attach().status_code == 201
    assert people.sees(people.owner)
