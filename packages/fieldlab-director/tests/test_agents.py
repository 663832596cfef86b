"""Machines that dial out: how they join, what they are asked, and what becomes of credentials, over real HTTP."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fieldlab_common.errors import ConnectorError
from fieldlab_common.joining import CREDENTIAL, RENEWAL
from fieldlab_common.keeping import Done, Liveness, ObserveRequest, Target
from fieldlab_director.agents import AgentInfrastructure
from fieldlab_director.store import schema

_named = itertools.count()


class Machine:
    """What an agent says over HTTP."""

    def __init__(self, field: Field, name: str = "pi", token: str = "") -> None:
        self.field = field
        joined = field.lab.client().post(
            "/v1/agents", json={"token": token or field.token(), "node": {"name": name, "os": "linux"}}
        )
        assert joined.status_code == 201, joined.text
        self.name, self.id, self.credential = (joined.json()[key] for key in ("name", "agent", "credential"))

    def ask(self, path: str, body: Any, credential: str = "", **query: Any) -> Any:
        http = self.field.lab.client(credential or self.credential)
        return http.post(f"/v1/agent/{path}", json=body, params=query)

    def poll(self, instance: str = "first", **more: Any) -> Any:
        return self.ask("poll", {"instance": instance}, **more)

    def calls(self, instance: str = "first", wait: float = 0.0) -> list[Any]:
        found: list[Any] = self.poll(instance, wait=wait).json()["calls"]
        return found

    def set(self, **values: Any) -> None:
        table = schema.agents
        self.field.lab.write(lambda tx: tx.execute(table.update().where(table.c.id == self.id).values(**values)))


class Field:
    """An infrastructure of agents, and its owner."""

    def __init__(self, lab: Any, owner: Any) -> None:
        self.lab, self.http, self.name = lab, owner.http, f"field-{next(_named)}"
        body = {"name": self.name, "spec": {"kind": "agents", "body": {"nodes": []}}}
        assert self.http.post("/v1/infrastructures", json=body).status_code == 201
        table = schema.infrastructures
        self.id = lab.write(lambda tx: tx.value(table.select().where(table.c.name == self.name)))

    def token(self, **wanted: Any) -> str:
        text: str = self.http.post(f"/v1/infrastructures/{self.name}/join-tokens", json=wanted).json()["token"]
        return text

    def nodes(self) -> dict[str, Any]:
        listed = self.http.get("/v1/nodes").json()["nodes"]
        return {node["name"]: node for node in listed if node["infrastructure"] == self.name}

    def join(self, token: str, name: str = "pi") -> int:
        return int(self.lab.client().post("/v1/agents", json={"token": token, "node": {"name": name}}).status_code)

    def asked(self, test: Any) -> Any:
        """What comes of a coroutine function that gets this infrastructure as the reconcile loop has it."""

        async def main() -> Any:
            infrastructure = AgentInfrastructure(self.lab.store, self.id, lambda _: None)
            try:
                async with asyncio.timeout(30):
                    return await test(infrastructure)
            finally:
                await infrastructure.close()

        return self.lab.run(main())


@pytest.fixture
def field(lab: Any, make_user: Any) -> Field:
    return Field(lab, make_user("owner"))


def test_a_machine_that_joins_is_a_node_at_once(field: Field) -> None:
    machine = Machine(field)
    assert field.nodes()["pi"]["availability"] == "available"
    assert field.nodes()["pi"]["os"] == "linux"
    assert machine.poll().json() == {"calls": [], "cancelled": []}


def test_a_token_is_good_for_so_many_machines_and_each_has_a_name_of_its_own(field: Field) -> None:
    token = field.token(uses=2)
    assert [field.join(token) for _ in range(3)] == [201, 201, 401]
    assert sorted(field.nodes()) == ["pi", "pi-2"]


def test_a_token_that_is_wrong_or_old_joins_nothing(field: Field) -> None:
    token = field.token()
    table = schema.join_tokens
    field.lab.write(lambda tx: tx.execute(table.update().values(expires=tx.now)))
    assert field.join(token) == 401
    assert field.join(field.token()[:-1] + "-") == 401
    assert field.join("nonsense") == 401
    assert field.nodes() == {}


@pytest.mark.parametrize("wanted", [{"uses": 0}, {"uses": 1_000_000}, {"expires": 0}, {"expires": 1e9}])
def test_a_token_for_too_much_is_refused(field: Field, wanted: Any) -> None:
    assert field.http.post(f"/v1/infrastructures/{field.name}/join-tokens", json=wanted).status_code == 422


def test_a_machine_that_was_removed_is_refused_at_once_also_while_it_waits(field: Field) -> None:
    machine = Machine(field)
    machine.poll()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(machine.poll, wait=30.0)
        field.lab.until_watched(f"agent:{machine.id}")
        assert field.http.delete(f"/v1/infrastructures/{field.name}/agents/pi").status_code == 200
        assert waiting.result(timeout=20).status_code == 401
    assert machine.poll().status_code == 401
    assert machine.ask("credential", {}).status_code == 401
    assert field.nodes() == {}


def test_a_new_credential_ends_the_old_one_when_it_is_first_used(field: Field) -> None:
    machine = Machine(field)
    fresh = machine.ask("credential", {}).json()["credential"]
    assert machine.poll().status_code == 200  # the answer may have been lost
    assert machine.poll(credential=fresh).status_code == 200
    refused = machine.poll()
    assert (refused.status_code, refused.json()["code"]) == (401, "doubled_identity")


def test_an_expired_credential_can_only_be_renewed_and_not_for_ever(field: Field) -> None:
    machine = Machine(field)
    now = field.lab.write(lambda tx: tx.now)
    machine.set(expires=now - 1.0)
    assert machine.poll().status_code == 403
    fresh = machine.ask("credential", {}).json()
    assert fresh["expires"] == pytest.approx(now + CREDENTIAL, abs=60)
    assert machine.poll(credential=fresh["credential"]).status_code == 200
    machine.set(expires=now - RENEWAL)
    assert machine.ask("credential", {}, credential=fresh["credential"]).status_code == 401


def test_two_machines_with_one_identity_are_found_and_said(field: Field) -> None:
    machine = Machine(field)
    machine.poll("original")
    assert machine.poll("copy").status_code == 200  # it may as well have been started again
    machine.poll("original")
    refused = machine.poll("copy")
    assert (refused.status_code, refused.json()["code"]) == (401, "doubled_identity")
    node = field.nodes()["pi"]
    assert node["availability"] == "offline"
    assert "Two machines" in node["reason"]
    assert field.http.get(f"/v1/infrastructures/{field.name}/agents").json()["agents"][0]["state"] == "doubled"


def test_a_machine_that_starts_again_is_asked_again_what_it_was_asked(field: Field) -> None:
    machine = Machine(field)
    machine.poll("before")

    async def test(infrastructure: AgentInfrastructure) -> Any:
        target = Target(deployment="d1", node="pi", epoch=1)
        asking = asyncio.create_task(infrastructure.call("observe", ObserveRequest(targets=(target,))))
        (first,) = await asyncio.to_thread(machine.calls, "before", 20.0)
        assert await asyncio.to_thread(machine.calls, "before") == []
        (again,) = await asyncio.to_thread(machine.calls, "after")
        assert (first["number"], first["method"]) == (again["number"], "observe")
        body = {"observations": [{"deployment": "d1", "executor": "alive"}]}
        answers = {"answers": {str(again["number"]): {"body": body}}}
        await asyncio.to_thread(machine.ask, "answers", answers)
        return await asking

    assert [one.executor for one in field.asked(test).observations] == [Liveness.ALIVE]


def test_what_nobody_waits_for_any_more_is_taken_back(field: Field) -> None:
    machine = Machine(field)
    machine.poll()

    async def test(infrastructure: AgentInfrastructure) -> Any:
        target = Target(deployment="d1", node="pi", epoch=1)
        asking = asyncio.create_task(infrastructure.call("stop", target))
        (call,) = await asyncio.to_thread(machine.calls, "first", 20.0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        told = await asyncio.to_thread(machine.poll)
        return call["number"], told.json()["cancelled"]

    number, cancelled = field.asked(test)
    assert cancelled == [number]


def test_an_agent_that_is_away_is_not_waited_for(field: Field) -> None:
    machine = Machine(field)
    machine.set(last_seen=1.0)

    async def test(infrastructure: AgentInfrastructure) -> None:
        with pytest.raises(ConnectorError, match="is not connected"):
            await infrastructure.call("stop", Target(deployment="d1", node="pi", epoch=1))
        with pytest.raises(ConnectorError, match="was removed"):
            await infrastructure.call("stop", Target(deployment="d1", node="nobody", epoch=1))

    field.asked(test)


def test_nothing_is_left_to_be_cleaned_up_of_a_machine_that_was_removed(field: Field) -> None:
    async def test(infrastructure: AgentInfrastructure) -> Any:
        return await infrastructure.call("clean_up", Target(deployment="d1", node="removed", epoch=1))

    assert field.asked(test) == Done()


def test_an_answer_to_anothers_call_changes_nothing(field: Field) -> None:
    machine, other = Machine(field, "one"), Machine(field, "two")
    machine.poll()

    async def test(infrastructure: AgentInfrastructure) -> Any:
        asking = asyncio.create_task(infrastructure.call("stop", Target(deployment="d1", node="one", epoch=1)))
        (call,) = await asyncio.to_thread(machine.calls, "first", 20.0)
        number = str(call["number"])
        await asyncio.to_thread(other.ask, "answers", {"answers": {number: {"body": {"tail": "forged"}}}})
        await asyncio.to_thread(machine.ask, "answers", {"answers": {number: {"body": {"tail": "true"}}}})
        return await asking

    assert field.asked(test).tail == "true"
