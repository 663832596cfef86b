"""Hosts behind SSH as a user's own nodes: an experiment across them, through tunnels, with the connections lost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fieldlab as fl
import netlab
import pytest
from fieldlab_director import Embedded, embedded
from greeting import greet


@pytest.fixture(scope="module")
def director(own_cache: None) -> Iterator[Embedded]:
    """A director of their own: the nodes that are attached here are not for other tests."""
    with embedded() as running:
        yield running


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[netlab.Netlab]:
    if why := netlab.missing():
        pytest.skip(why)
    with contextlib.closing(netlab.Netlab(tmp_path / "lab")) as made:
        yield made


def test_hosts_wait_for_the_directors_own_key_to_be_let_in(
    client: fl.Client, lab: netlab.Netlab, name: str, tmp_path: Path
) -> None:
    host = lab.host("one")
    spec = fl.SSH(
        hosts=[{"name": f"{name}-one", "host": host.address, "user": "root"}],
        host_keys=[host.public_key],
        link="tunnel",
    )
    made = client.infrastructures.attach(name, spec)
    assert made.info.state == "unavailable"
    assert "authorized_keys of root there: ssh-ed25519 " in made.info.message
    host.authorize(made.info.message.split("there: ")[1])
    lines = made.check()
    assert [line for line in lines if line.needed and not line.ok] == []
    assert {line.what for line in lines} >= {"reachable", "login", "executor", "clock"}
    assert client.infrastructures.get(name).info.state == "ready"
    with fl.DAG("d") as dag:
        greet()
    run = client.submit(fl.Experiment(name).map(dag, client.nodes().where(fl.node["infrastructure"] == name)))
    run.events.wait("here", timeout=90)
    run.events.send("go")
    assert run.wait(timeout=90) is fl.ExperimentState.SUCCEEDED, run.results


def test_a_run_on_two_hosts_goes_on_when_their_connections_are_lost(
    client: fl.Client, lab: netlab.Netlab, name: str, tmp_path: Path, until: Callable[..., fl.Results]
) -> None:
    private, public = netlab.keypair(lab.folder)
    (tmp_path / "key").write_text(private)
    hosts = [lab.host("one"), lab.host("two")]
    for host in hosts:
        host.authorize(public)
    spec = fl.SSH(
        hosts=[{"name": f"{name}-{host.name}", "host": host.address, "user": "root", "site": "lab"} for host in hosts],
        key=str(tmp_path / "key"),
        host_keys=[host.public_key for host in hosts],
        link="tunnel",
    )
    client.infrastructures.attach(name, spec)
    nodes = client.nodes().where(fl.node["infrastructure"] == name)
    with fl.DAG("d") as dag:
        start = fl.barrier("start", timeout=60)
        greet().after(start)
    run = client.submit(fl.Experiment(name).map(dag, nodes))
    run.events.wait("here", count=2, timeout=90)
    for host in hosts:
        host.run("pkill", "-KILL", "-f", "sshd: root@notty")  # every connection, and with it keeper and tunnel
    run.events.send("go")
    assert run.wait(timeout=90) is fl.ExperimentState.SUCCEEDED, run.results
    assert {one["greet"].value for one in run.results.values()} == {"one", "two"}
    assert len(run.artifacts.download(tmp_path / "out")) == 2
    assert sorted(line.text.strip() for line in run.logs(stream="stdout")) == [
        "greetings from one",
        "greetings from two",
    ]
