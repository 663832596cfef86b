"""The client with a real director, which the test starts itself: answers over HTTP, and a restart in the middle."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest
from fieldlab_director import embedded


@pytest.fixture(scope="module")
def director(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("director")
    with embedded(folder, nodes=[{"name": "a", "site": "lab"}, "b"]) as running:
        yield running


@pytest.fixture
def client(director: Any) -> Iterator[fl.Client]:
    with fl.Client(director.url, director.token) as made:
        yield made


@fl.task
def add(a: int, b: int) -> int:
    return a + b


@fl.task
def count_up_to_go(*, ctx: fl.TaskContext) -> int:
    ctx.events.send("counting")
    print("line before")
    go = ctx.events.wait("go", timeout=90)[0]
    print("line after")
    Path(ctx.artifact("big.bin")).write_bytes(b"0123456789" * 100_000)
    return int(go.data) + 1


def experiment(client: fl.Client, name: str) -> fl.Experiment:
    with fl.DAG("d") as dag:
        add(add(1, 2), 3).named("total")
    return fl.Experiment(name).map(dag, client.nodes().where(fl.node.infrastructure == "local"))


def test_who_and_what_is_there(client: fl.Client) -> None:
    assert client.health().status == "ok"
    assert client.whoami().role == "admin"
    assert client.nodes().where(fl.node["site"] == "lab").names == ("a",)
    assert [one.kind for one in client.infrastructures.list()] == ["local"]


def test_a_run_from_submit_to_results(client: fl.Client) -> None:
    run = client.submit(experiment(client, "whole"))
    assert run.wait(timeout=100, raise_on_failure=True) is fl.ExperimentState.SUCCEEDED
    assert [row["value"] for row in run.results.rows()] == [3, 6, 3, 6]
    again = client.run("whole")
    assert again.results["b"]["total"].value == 6
    assert list(again.results["a"]) == ["add", "total"]
    assert "whole" in [one.name for one in client.experiments()]


def test_a_name_that_is_taken_is_attached_to_or_made_new(client: fl.Client) -> None:
    first = client.prepare(experiment(client, "taken"))
    with pytest.raises(fl.ExperimentExists, match="attach"):
        client.submit(experiment(client, "taken"))
    assert client.submit(experiment(client, "taken"), if_exists="attach").id == first.id
    other = client.prepare(experiment(client, "taken"), if_exists="new")
    assert other.name == "taken#2"
    for run in (first, other):
        run.cancel("not needed")
        assert run.wait(timeout=60) is fl.ExperimentState.CANCELLED


def test_a_run_is_run_once_more_and_let_go(client: fl.Client) -> None:
    run = client.submit(experiment(client, "again"))
    run.wait(timeout=60, raise_on_failure=True)
    second = run.rerun()
    assert second.name == "again#2"
    second.wait(timeout=60, raise_on_failure=True)
    assert second.results["a"]["total"].value == run.results["a"]["total"].value == 6
    assert [one.name for one in client.experiments(name="again*", since="1h")] == ["again#2", "again"]
    client.delete("again")
    with pytest.raises(fl.NotFound):
        client.run("again")
    second.delete()
    assert not client.experiments(name="again*")


def test_a_run_that_waits_for_a_node_says_for_which_and_since_when(client: fl.Client) -> None:
    first = client.prepare(experiment(client, "first"))
    second = client.submit(experiment(client, "second"))
    waits = second.info.waits_for
    assert [(one.node, one.runs, one.others) for one in waits] == [("a", ("first",), 0), ("b", ("first",), 0)]
    assert {one.since for one in waits} == {first.info.granted}
    with pytest.raises(fl.WaitTimeout, match=r"it waits for a \(held by your run 'first'"):
        second.wait(timeout=0)
    with pytest.raises(fl.IllegalState, match="preparing"):
        second.delete()
    first.delete(force=True)
    assert second.wait(timeout=60) is fl.ExperimentState.SUCCEEDED


def test_elastic_nodes_run_and_are_gone_afterwards(client: fl.Client) -> None:
    client.infrastructures.attach("cloud", fl.Local(elastic=2, prefix="vm", properties={"zone": "x"}))
    pool = client.nodes().where(fl.node["zone"] == "x")
    nodes = pool.take(2)
    with fl.DAG("d") as dag:
        add(1, 2).named("total")
    run = client.submit(fl.Experiment("elastic").map(dag, nodes))
    assert run.wait(timeout=60) is fl.ExperimentState.SUCCEEDED
    assert {run.results[name]["total"].value for name in nodes.names} == {3}
    assert "vm" in client.nodes().names
    assert not set(nodes.names) & set(client.nodes().names)
    with pytest.raises(fl.DefinitionError, match="template"):
        fl.Experiment("no").map(dag, client.nodes()["vm"])


def test_errors_have_their_types(client: fl.Client, director: Any) -> None:
    with pytest.raises(fl.NotFound):
        client.run("no-such-run")
    with pytest.raises(fl.AuthenticationError, match="FIELDLAB_TOKEN"):
        fl.Client(director.url, "flu_wrong").nodes()
    with pytest.raises(fl.IllegalState):
        client.infrastructures.attach("local", fl.Local(nodes=1))


def test_everything_that_follows_a_run_outlives_its_director(client: fl.Client, director: Any, tmp_path: Path) -> None:
    with fl.DAG("d") as dag:
        count_up_to_go()
    run = client.submit(fl.Experiment("restarted").map(dag, client.nodes()["a"]))
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(line.text for line in run.logs(follow=True)))
    waiter = threading.Thread(target=lambda: run.wait(timeout=110))
    reader.start()
    run.events.wait("counting", timeout=60)
    waiter.start()
    director.kill()
    sender = threading.Thread(target=lambda: run.events.send("go", 41))
    sender.start()  # nobody is there to take it yet
    director.restart()
    for thread in (sender, waiter, reader):
        thread.join(100)
        assert not thread.is_alive()
    assert run.state is fl.ExperimentState.SUCCEEDED
    assert run.results["a"]["count_up_to_go"].value == 42
    assert run.events.count("go") == 1
    assert lines == ["line before", "line after"]
    written = run.artifacts.download(tmp_path)
    assert written[0].read_bytes() == b"0123456789" * 100_000
