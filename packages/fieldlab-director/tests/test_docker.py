"""What is particular to containers of a Docker engine, with a real dockerd."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import dockerlab
import pytest
from fieldlab_common.environment import Container, Host, Resources
from fieldlab_common.errors import ConnectorError
from fieldlab_common.node import Availability
from fieldlab_common.protocol import Launch, Tagged
from fieldlab_common.wire import encode
from fieldlab_director.connectors import base as b
from fieldlab_director.connectors.host import ConnectorProcess

STANDIN = Path(__file__).with_name("standin.py")
TOKEN = "a-token-that-nobody-else-may-see"
PATIENCE = 60.0


class Site:
    """A connector with options, its engine, and one deployment."""

    def __init__(self, engine: dockerlab.DockerLab, folder: Path, executable: Path, options: dict[str, Any]) -> None:
        self.engine, self.id = engine, f"i{secrets.token_hex(6)}"
        given = {"engine": engine.address, "mounts": [f"{STANDIN}:/standin.py:ro"], "executable": "/standin.py"}
        opening = b.Opening(
            infrastructure="lab",
            folder=str(folder / self.id),
            executable=str(executable),
            options={"image": dockerlab.IMAGE, **given, **options},
        )
        self.notices: asyncio.Queue[str | None] = asyncio.Queue()
        self.process = ConnectorProcess("docker", opening, notice=self.notices.put_nowait)
        self.target = b.Target(deployment="d1", node="docker-1", epoch=1)

    async def prepare(self, environment: Host | Container | None = None, **more: Any) -> b.Prepared:
        value = environment or Host()
        tagged = Tagged(kind=value.kind, body=encode(value))
        request = b.PrepareRequest(target=self.target, environment=tagged, **more)
        return await self.process.call("prepare", request)  # type: ignore[no-any-return]

    def launched(self, what: str = "stay") -> Launch:
        return Launch(director="http://x", token=TOKEN, experiment=what, deployment="d1", epoch=1)

    async def launch(self, target: b.Target | None = None) -> None:
        """Start the executor, and wait until it is up."""
        request = b.LaunchRequest(target=target or self.target, launch=self.launched())
        await self.process.call("launch", request)
        up = ["exec", self.container, "cat", "/fieldlab/nodes/d1/1/up"]
        async with asyncio.timeout(PATIENCE):
            while await asyncio.to_thread(self.fails, *up):  # noqa: ASYNC110 - another process makes it true, by a file
                await asyncio.sleep(0.05)

    def fails(self, *words: str) -> bool:
        done = subprocess.run(self.engine.command(*words), capture_output=True, timeout=PATIENCE, check=False)
        return done.returncode != 0

    async def look(self) -> b.Observation:
        answer: b.Observations = await self.process.call("observe", b.ObserveRequest(targets=(self.target,)))
        return answer.observations[0]

    @property
    def containers(self) -> list[str]:
        return self.engine.containers(f"fieldlab={self.id}")

    @property
    def container(self) -> str:
        (found,) = self.containers
        return found

    @property
    def inspected(self) -> dict[str, Any]:
        (found,) = json.loads(self.engine.docker("inspect", self.container))
        return dict(found)


Test = Callable[[Site], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def on_engine(engine: dockerlab.DockerLab, tmp_path: Path, executable: Path) -> Run:
    """Run an asynchronous test against a connector with some options."""

    def run(test: Test, **options: Any) -> None:
        async def main() -> None:
            site = Site(engine, tmp_path, executable, options)
            try:
                await test(site)
            finally:
                await site.process.close()
                for left in site.containers:
                    engine.docker("rm", "--force", left)

        asyncio.run(main())

    return run


def test_a_killed_container_is_noticed_and_drained_and_leaves_nothing(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        await site.prepare()
        await site.launch()
        site.engine.docker("kill", site.container)
        async with asyncio.timeout(PATIENCE):
            assert await site.notices.get() == "d1"
            while (seen := await site.look()).executor is not b.Liveness.DEAD:
                await site.notices.get()
        stopped: b.Stopped = await site.process.call("stop", site.target)
        assert stopped.tail == seen.tail
        assert "exit 137" in seen.tail
        await site.process.call("drain", b.DrainRequest(target=site.target, launch=site.launched()))
        assert site.engine.docker("exec", site.container, "cat", "/fieldlab/nodes/d1/drains") == "http://here:1\n"
        assert (await site.look()).executor is b.Liveness.DEAD
        await site.process.call("clean_up", site.target)
        await site.process.call("clean_up", site.target)
        assert site.containers == []
        assert (await site.look()).executor is b.Liveness.ABSENT

    on_engine(test, director_url="http://here:1")


def test_a_container_that_died_before_its_executor_was_started_is_absent_and_started_again(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        await site.prepare()
        site.engine.docker("kill", site.container)
        assert (await site.look()).executor is b.Liveness.ABSENT
        await site.launch()
        assert (await site.look()).executor is b.Liveness.ALIVE

    on_engine(test)


def test_a_container_that_was_removed_is_made_anew_as_it_was_prepared(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        made = await site.prepare(Container(image=dockerlab.IMAGE), resources=Resources(memory="64 MiB"))
        site.engine.docker("rm", "--force", site.container)
        await site.launch(b.Target(deployment="d1", node="docker-1", epoch=1, prepared=made.prepared))
        assert site.inspected["Config"]["Image"] == dockerlab.IMAGE
        assert site.inspected["HostConfig"]["Memory"] == 64 * 1024**2

    on_engine(test, image="nobody/has-this:1")


def test_a_container_has_the_limits_asked_for_else_those_of_its_infrastructure(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        await site.prepare(resources=Resources(cpus=0.5))
        host = site.inspected["HostConfig"]
        assert (host["NanoCpus"], host["Memory"], host["MemorySwap"]) == (5 * 10**8, 256 * 1024**2, 256 * 1024**2)
        assert host["CapAdd"] == ["NET_ADMIN"]

    on_engine(test, cpus=2, memory=256 * 1024**2, capabilities=["NET_ADMIN"])


def test_the_engine_is_told_whose_a_container_is_and_no_secret(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        await site.prepare()
        await site.launch()
        labels = site.inspected["Config"]["Labels"]
        assert labels == {
            "fieldlab": site.id,
            "fieldlab.infrastructure": "lab",
            "fieldlab.deployment": "d1",
            "fieldlab.node": "docker-1",
        }
        assert TOKEN not in json.dumps(site.inspected)
        assert TOKEN not in site.engine.docker("top", site.container)
        assert TOKEN in site.engine.docker("exec", site.container, "cat", "/fieldlab/nodes/d1/1/launch.json")

    on_engine(test)


def test_while_the_engine_is_away_its_nodes_are_offline_and_executors_go_on(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        await site.prepare()
        await site.launch()
        (known,) = (await site.process.call("nodes", b.Nothing())).nodes
        await asyncio.to_thread(site.engine.stop)
        try:
            (away,) = (await site.process.call("nodes", b.Nothing())).nodes
            with pytest.raises(ConnectorError, match="cannot be reached") as caught:
                await site.look()
            assert caught.value.transient
        finally:
            await asyncio.to_thread(site.engine.start)
        assert (away.availability, away.architecture) == (Availability.OFFLINE, known.architecture)
        assert "cannot be reached" in away.reason
        assert (await site.look()).executor is b.Liveness.ALIVE
        assert (await site.process.call("nodes", b.Nothing())).nodes == (known,)

    on_engine(test)


def test_an_image_that_is_not_to_be_had_is_named(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        with pytest.raises(ConnectorError, match=r"has no image '127\.0\.0\.1:9/none:1'"):
            await site.prepare(Container(image="127.0.0.1:9/none:1"))
        assert site.containers == []

    on_engine(test)


def test_the_user_of_an_image_need_not_be_root(on_engine: Run) -> None:
    async def test(site: Site) -> None:
        await asyncio.to_thread(site.engine.derive, "fieldlab-test:who", "USER who")
        await site.prepare(Container(image="fieldlab-test:who"))
        await site.launch()
        assert (await site.look()).executor is b.Liveness.ALIVE

    on_engine(test)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "http://engine"}, "unix:///path or tcp://host:port"),
        ({"engine": "tcp://engine:2376"}, "takes ca, certificate and key"),
        ({"engine": "tcp://engine:2376", "ca": "a", "certificate": "b", "key": "c"}, "cannot be used"),
        ({"mounts": "/a:/b"}, "mounts as a list"),
        ({"host": "h"}, "no option host"),
    ],
)
def test_wrong_options_are_refused_with_what_is_wrong(on_engine: Run, options: dict[str, Any], said: str) -> None:
    async def test(site: Site) -> None:
        with pytest.raises(ConnectorError, match=said) as caught:
            await site.process.call("check", b.Nothing())
        assert not caught.value.transient

    on_engine(test, **options)
