"""Containers of a Docker engine as nodes: a run across them, one that fails, one that is cancelled or killed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import dockerlab
import fieldlab as fl
import pytest
from fieldlab_director import Embedded, embedded
from greeting import fail, first, greet, hang

PATIENCE = 90.0


@dataclass
class Lab:
    """An engine that is attached, and two nodes of its template."""

    engine: dockerlab.DockerLab
    name: str
    nodes: fl.NodePool

    def containers(self) -> list[str]:
        return self.engine.containers(f"fieldlab.infrastructure={self.name}")

    def is_left_clean(self) -> bool:
        """Whether all containers are gone, now or soon."""
        deadline = time.monotonic() + PATIENCE
        while self.containers():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)  # nothing tells of it
        return True


@pytest.fixture(scope="module")
def director(own_cache: None) -> Iterator[Embedded]:
    """A director of their own: the nodes that are attached here are not for other tests."""
    with embedded() as running:
        yield running


@pytest.fixture(scope="module")
def engine() -> Iterator[dockerlab.DockerLab]:
    if why := dockerlab.missing():
        pytest.skip(why)
    with contextlib.closing(dockerlab.DockerLab()) as lab:
        yield lab


@pytest.fixture(scope="module")
def relayed(engine: dockerlab.DockerLab, director: Embedded) -> Iterator[str]:
    with engine.relay(urlsplit(director.url).port or 0) as url:
        yield url


@pytest.fixture
def lab(client: fl.Client, engine: dockerlab.DockerLab, relayed: str, name: str) -> Lab:
    spec = fl.Docker(engine=engine.address, elastic=2, prefix=name, image=dockerlab.IMAGE, director_url=relayed)
    client.infrastructures.attach(name, spec)
    return Lab(engine, name, client.nodes().where(fl.node.name == name).take(2))


def test_a_run_in_two_containers_meets_and_brings_everything_back(
    client: fl.Client, lab: Lab, name: str, tmp_path: Path
) -> None:
    with fl.DAG("d") as dag:
        start = fl.barrier("start", timeout=60)
        greet().after(start)
    exp = fl.Experiment(name).map(
        dag, lab.nodes, env=fl.Container(image=dockerlab.IMAGE), resources=fl.Resources(cpus=1)
    )
    assert fl.plan(exp).problems == ()
    run = client.submit(exp)
    run.events.wait("here", count=2, timeout=PATIENCE)
    hosts = {container[:12] for container in lab.containers()}
    run.events.send("go")
    assert run.wait(timeout=PATIENCE) is fl.ExperimentState.SUCCEEDED, run.results
    assert {one["greet"].value for one in run.results.values()} == hosts
    assert len(run.artifacts.download(tmp_path / "out")) == 2
    assert {line.text.split()[-1] for line in run.logs(stream="stdout")} == hosts
    assert lab.is_left_clean()


def test_a_failing_step_in_a_container_fails_its_run(client: fl.Client, lab: Lab, name: str) -> None:
    with fl.DAG("d") as dag:
        fail()
    run = client.submit(fl.Experiment(name).map(dag, lab.nodes.take(1)))
    assert run.wait(timeout=PATIENCE) is fl.ExperimentState.FAILED
    (found,) = run.results.values()
    assert "no such luck" in str(found["fail"].error)
    assert lab.is_left_clean()


def test_a_cancelled_run_leaves_no_container(client: fl.Client, lab: Lab, name: str) -> None:
    with fl.DAG("d") as dag:
        hang()
    run = client.submit(fl.Experiment(name).map(dag, lab.nodes))
    run.events.wait("hanging", count=2, timeout=PATIENCE)
    run.cancel(reason="enough")
    assert run.wait(timeout=PATIENCE) is fl.ExperimentState.CANCELLED
    assert lab.is_left_clean()


def test_a_container_that_is_killed_amid_a_run_keeps_what_was_done(
    client: fl.Client, lab: Lab, name: str, until: Callable[..., fl.Results]
) -> None:
    with fl.DAG("d") as dag:
        first() >> hang()
    run = client.submit(fl.Experiment(name).map(dag, lab.nodes.take(1)))
    run.events.wait("hanging", timeout=PATIENCE)
    lab.engine.docker("kill", *lab.containers())
    assert run.wait(timeout=PATIENCE) is fl.ExperimentState.FAILED
    (found,) = run.results.values()
    assert found["first"].value == "done before"
    assert "exit 137" in str(found.message)
    assert lab.is_left_clean()
