"""What is Slurm's own about nodes of a Slurm cluster; what all connectors do stands in test_connectors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import netlab
import pytest
import slurmlab
from fieldlab_common.environment import Resources
from fieldlab_common.errors import ConnectorError
from fieldlab_common.node import Availability, Node
from fieldlab_common.protocol import Launch
from fieldlab_director.connectors import base as b
from fieldlab_director.connectors.fleet import ConnectorFleet

STANDIN = Path(__file__).with_name("standin.py")
PATIENCE = 30.0
Ask = Callable[[str, Any], Any]


@pytest.fixture
def options(cluster: slurmlab.Slurmlab, tmp_path: Path) -> dict[str, Any]:
    """Of an infrastructure on the cluster."""
    return {"folder": str(tmp_path / "shared"), "config": str(cluster.config), "executable": str(STANDIN)}


@contextlib.asynccontextmanager
async def attached(folder: Path, executable: Path, options: dict[str, Any]) -> AsyncIterator[Ask]:
    fleet = ConnectorFleet(folder, executable)
    try:
        yield fleet.connector(folder.name, "lab", "slurm", options, trusted=True).call
    finally:
        await fleet.close()


async def nodes_of(ask: Ask) -> dict[str, Node]:
    listed: b.Listed = await ask("nodes", b.Nothing())
    return {node.name: node for node in listed.nodes}


async def launched(ask: Ask, node: str = "local-1", resources: Resources | None = None) -> b.Target:
    target = b.Target(deployment="d1", node=node, epoch=1)
    launch = Launch(director="http://x", token="t", experiment="stay", deployment="d1", epoch=1)
    await ask("launch", b.LaunchRequest(target=target, launch=launch, resources=resources or Resources()))
    return target


async def seen(ask: Ask, target: b.Target, wanted: b.Liveness) -> b.Observation:
    async with asyncio.timeout(PATIENCE):
        while True:
            (found,) = (await ask("observe", b.ObserveRequest(targets=(target,)))).observations
            if found.executor is wanted:
                assert isinstance(found, b.Observation)
                return found
            await asyncio.sleep(0.1)


def test_a_partition_is_a_node_with_a_slot_for_each_of_its_machines(
    tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, {**options, "nodes": "partitions"}) as ask:
            found = await nodes_of(ask)
            assert {name: node.slots for name, node in found.items()} == {"main": 3, "small": 1}
            target = await launched(ask, "small")
            await seen(ask, target, b.Liveness.ALIVE)
            await ask("stop", target)

    asyncio.run(test())


def test_only_the_nodes_of_a_partition_that_is_named_are_nodes(
    tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, {**options, "partition": "small"}) as ask:
            assert list(await nodes_of(ask)) == ["local-1"]
        async with attached(tmp_path, executable, {**options, "partition": "none"}) as ask:
            why = (await ask("check", b.Nothing())).hopeless()
            assert why is not None
            assert "no node in partition 'none'" in why.said

    asyncio.run(test())


def test_a_node_that_its_admin_took_out_says_so_and_comes_back(
    cluster: slurmlab.Slurmlab, tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, options) as ask:
            cluster.run("scontrol", "update", "nodename=local-2", "state=drain", "reason=new State=IDLE disk")
            node = (await nodes_of(ask))["local-2"]
            assert node.availability is Availability.DISABLED
            assert "new State=IDLE disk" in node.reason
            cluster.run("scontrol", "update", "nodename=local-2", "state=resume")
            async with asyncio.timeout(PATIENCE):
                while (await nodes_of(ask))["local-2"].availability is not Availability.AVAILABLE:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)

    asyncio.run(test())


def test_a_job_that_no_node_can_hold_is_refused_for_good(
    tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, options) as ask:
            with pytest.raises(ConnectorError, match="sbatch refuses") as caught:
                await launched(ask, resources=Resources(memory="64 GiB"))
            assert not caught.value.transient

    asyncio.run(test())


def test_a_job_is_told_to_end_before_its_time_is_over(
    cluster: slurmlab.Slurmlab, tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, options) as ask:
            target = await launched(ask, resources=Resources(walltime="10m"))
            await seen(ask, target, b.Liveness.ALIVE)
            up = tmp_path / "shared" / "nodes" / tmp_path.name / "d1" / "1" / "up"
            async with asyncio.timeout(PATIENCE):
                while not up.exists():  # noqa: ASYNC110 - a job makes it
                    await asyncio.sleep(0.05)
            job = cluster.run("squeue", "--noheader", "--format=%i", "--states=running").split()[0]
            cluster.run("scontrol", "update", f"jobid={job}", "timelimit=1")  # the executor would have more
            await seen(ask, target, b.Liveness.DEAD)
            assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", job)

    asyncio.run(test())


def test_while_the_controller_is_away_it_is_said_and_jobs_go_on(
    cluster: slurmlab.Slurmlab, tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, options) as ask:
            target = await launched(ask)
            await seen(ask, target, b.Liveness.ALIVE)
            cluster.switch_off()
            try:
                with pytest.raises(ConnectorError, match="controller does not answer") as caught:
                    await ask("nodes", b.Nothing())
                assert caught.value.transient
            finally:
                cluster.switch_on()
            await seen(ask, target, b.Liveness.ALIVE)
            await ask("stop", target)

    asyncio.run(test())


def test_a_cluster_behind_a_login_host_is_used_through_it(
    cluster: slurmlab.Slurmlab, tmp_path: Path, executable: Path, options: dict[str, Any]
) -> None:
    if why := netlab.missing():
        pytest.skip(why)
    private, public = netlab.keypair(tmp_path)

    async def test(host: netlab.Host) -> None:
        settings = cluster.config.read_text().replace("(127.0.0.1)", f"({host.lab.network}.1)")
        (tmp_path / "slurm.conf").write_text(settings)  # by it the host finds the controller across the bridge
        there = {"login": {"host": host.address, "user": "root"}, "key": private, "host_keys": [host.public_key]}
        async with attached(tmp_path, executable, {**options, **there, "config": str(tmp_path / "slurm.conf")}) as ask:
            assert (await ask("check", b.Nothing())).hopeless() is None
            assert list(await nodes_of(ask)) == ["local-1", "local-2", "local-3"]
            target = await launched(ask)
            await seen(ask, target, b.Liveness.ALIVE)
            await ask("stop", target)
            await seen(ask, target, b.Liveness.DEAD)

    with contextlib.closing(netlab.Netlab(tmp_path / "lab")) as lab:
        host = lab.host("login")
        host.authorize(public)
        asyncio.run(test(host))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "folder as a path"),
        ({"folder": "/x", "hosts": []}, "no option hosts"),
        ({"folder": "/x", "nodes": "racks"}, "hosts or partitions"),
        ({"folder": "/x", "partition": "--wrap=id"}, "partition as a text"),
        ({"folder": "/x", "slots": 0}, "1 to 1000"),
    ],
)
def test_wrong_options_are_refused_with_what_is_wrong(
    tmp_path: Path, executable: Path, options: dict[str, Any], said: str
) -> None:
    async def test() -> None:
        async with attached(tmp_path, executable, options) as ask:
            with pytest.raises(ConnectorError, match=said) as caught:
                await ask("check", b.Nothing())
            assert not caught.value.transient

    asyncio.run(test())
