"""What every connector must do, held by each one that there is, in its own process as the director runs it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dockerlab
import netlab
import pytest
import slurmlab
from fieldlab_common.environment import Host, Requirements, Venv
from fieldlab_common.errors import ConnectorError, UnknownConnector
from fieldlab_common.node import Elastic
from fieldlab_common.protocol import Launch, Tagged
from fieldlab_common.wire import encode
from fieldlab_director.connectors import base as b
from fieldlab_director.connectors.fleet import ConnectorFleet
from fieldlab_director.connectors.host import ConnectorProcess, kinds

STANDIN = Path(__file__).with_name("standin.py")
PATIENCE = 30.0


@dataclass
class Site:
    """One infrastructure, and its connector in a process."""

    kind: str
    folder: Path
    process: ConnectorProcess
    opening: b.Opening
    inside: Callable[[str, list[str]], list[str]] | None = None  # a command line where a deployment's processes are
    cluster: slurmlab.Slurmlab | None = None
    notices: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)

    def target(self, name: str = "d1", epoch: int = 1) -> b.Target:
        return b.Target(deployment=name, node="local-1", epoch=epoch)

    async def launch(self, what: str, target: b.Target | None = None) -> b.Target:
        target = target or self.target()
        launch = Launch(
            director="http://x", token="t", experiment=what, deployment=target.deployment, epoch=target.epoch
        )
        await self.process.call("prepare", b.PrepareRequest(target=target, environment=environment(Host())))
        await self.process.call("launch", b.LaunchRequest(target=target, launch=launch))
        return target

    async def look(self, target: b.Target) -> b.Observation:
        answer: b.Observations = await self.process.call("observe", b.ObserveRequest(targets=(target,)))
        return answer.observations[0]

    async def until(self, target: b.Target, wanted: b.Liveness) -> b.Observation:
        """The first look that finds the executor as wanted; looked for at each notice, and now and then."""
        async with asyncio.timeout(PATIENCE):
            while (seen := await self.look(target)).executor is not wanted:
                try:
                    await asyncio.wait_for(self.notices.get(), 0.1)
                except TimeoutError:
                    continue
        return seen

    async def up(self, target: b.Target) -> None:
        """Wait until the stand-in has done all that it does before it waits."""
        await wait_for((self.folder / target.deployment / str(target.epoch) / "up").exists)

    def kill(self, target: b.Target) -> None:
        self.end(self.noted(target))

    def noted(self, target: b.Target) -> Path:
        """Where it stands which process, or job, an executor is."""
        return self.folder / target.deployment / f"{target.epoch}.{'job' if self.cluster else 'pid'}"

    def end(self, noted: Path) -> None:
        if self.cluster is not None:
            self.cluster.run("scancel", "--full", "--signal=KILL", noted.read_text())
            return
        pid = int(json.loads(noted.read_text())["pid"])
        if self.inside is not None:
            command = self.inside(noted.parent.name, ["sh", "-c", f"kill -KILL {pid}"])
            subprocess.run(command, check=False, capture_output=True, timeout=30)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def starts(self, name: str = "d1") -> list[str]:
        return (self.folder / name / "starts").read_text().split()

    def drains(self, name: str = "d1") -> list[str]:
        path = self.folder / name / "drains"
        return path.read_text().split() if path.exists() else []

    def restarted(self) -> ConnectorProcess:
        self.process = ConnectorProcess(self.kind, self.opening, notice=self.notices.put_nowait)
        return self.process


async def wait_for(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true():  # noqa: ASYNC110 - another process makes it true, by a file
            await asyncio.sleep(0.01)


def environment(value: Host | Venv) -> Tagged:
    return Tagged(kind=value.kind, body=encode(value))


def drain_of(target: b.Target, what: str = "stay") -> b.DrainRequest:
    launch = Launch(
        director="http://anew", token="t", experiment=what, deployment=target.deployment, epoch=target.epoch
    )
    return b.DrainRequest(target=target, launch=launch)


@dataclass(frozen=True)
class Login:
    """A host on this machine, and the key that opens it."""

    host: netlab.Host
    key: str


@pytest.fixture(scope="session")
def login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Login]:
    """A real OpenSSH server, in a network namespace."""
    if why := netlab.missing():
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("netlab")
    private, public = netlab.keypair(folder)
    with contextlib.closing(netlab.Netlab(folder)) as lab:
        host = lab.host("server")
        host.authorize(public)
        yield Login(host, private)


def local_site(folder: Path, executable: Path) -> Site:
    options = {"nodes": 3, "executable": str(STANDIN), "properties": {"site": "lab"}}
    opening = b.Opening(
        infrastructure="lab", folder=str(folder / "infrastructure"), executable=str(executable), options=options
    )
    return Site("local", folder / "infrastructure", None, opening)  # type: ignore[arg-type]


def ssh_site(folder: Path, executable: Path, login: Login) -> Site:
    named = [
        {"name": f"local-{number}", "host": login.host.address, "user": "root", "properties": {"site": "lab"}}
        for number in (1, 2, 3)
    ]
    options = {"hosts": named, "key": login.key, "host_keys": [login.host.public_key], "executable": str(STANDIN)}
    opening = b.Opening(infrastructure="lab", folder=str(folder), executable=str(executable), options=options)
    there = login.host.home / ".local" / "state" / "fieldlab" / "nodes" / folder.name
    return Site("ssh", there, None, opening, lambda _, words: login.host.command(*words))  # type: ignore[arg-type]


def docker_site(folder: Path, executable: Path, engine: dockerlab.DockerLab) -> Site:
    there = folder / "nodes"
    there.mkdir()
    options = {
        "engine": engine.address,
        "image": dockerlab.IMAGE,
        "nodes": 3,
        "prefix": "local",
        "properties": {"site": "lab"},
        "cpus": 2,
        "mounts": [f"{there}:/fieldlab/nodes", f"{STANDIN}:/standin.py:ro"],
        "executable": "/standin.py",
    }
    own = folder / f"i{secrets.token_hex(6)}"
    opening = b.Opening(infrastructure="lab", folder=str(own), executable=str(executable), options=options)

    def inside(deployment: str, words: list[str]) -> list[str]:
        found = engine.containers(f"fieldlab={own.name}", f"fieldlab.deployment={deployment}")
        return engine.command("exec", *(found or ["none"]), *words)

    return Site("docker", there, None, opening, inside)  # type: ignore[arg-type]


def slurm_site(folder: Path, executable: Path, cluster: slurmlab.Slurmlab) -> Site:
    options = {"folder": str(folder / "shared"), "config": str(cluster.config), "executable": str(STANDIN)}
    options["properties"] = {"site": "lab"}
    opening = b.Opening(infrastructure="lab", folder=str(folder), executable=str(executable), options=options)
    return Site("slurm", folder / "shared" / "nodes" / folder.name, None, opening, cluster=cluster)  # type: ignore[arg-type]


@asynccontextmanager
async def opened(site: Site) -> AsyncIterator[Site]:
    site.restarted()
    try:
        yield site
    finally:
        await site.process.close()
        for path in [*site.folder.glob("*/*.pid"), *site.folder.glob("*/*.job")]:
            site.end(path)


Test = Callable[[Site], Awaitable[None]]


@pytest.fixture(params=["local", "ssh", "docker", "slurm"])
def on_site(request: pytest.FixtureRequest, tmp_path: Path, executable: Path) -> Callable[[Test], None]:
    """Run an asynchronous test against one kind of connector."""
    if request.param == "ssh":
        site = ssh_site(tmp_path, executable, request.getfixturevalue("login"))
    elif request.param == "docker":
        site = docker_site(tmp_path, executable, request.getfixturevalue("engine"))
    elif request.param == "slurm":
        site = slurm_site(tmp_path, executable, request.getfixturevalue("cluster"))
    else:
        site = local_site(tmp_path, executable)

    def run(test: Test) -> None:
        async def main() -> None:
            async with opened(site):
                await test(site)

        asyncio.run(main())

    return run


def test_what_it_tries_is_told_line_by_line(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        checked: b.Checked = await site.process.call("check", b.Nothing())
        assert checked.hopeless() is None
        if site.kind == "docker":  # there is no container yet that could be tried
            assert [(line.what, line.ok) for line in checked.lines] == [("engine", True)]
            return
        nodes = {line.node for line in checked.lines}
        assert len(nodes) == (3 if site.kind == "ssh" else 1)
        for node in nodes:
            lines = {line.what: line for line in checked.lines if line.node == node}
            assert {"executor", "Python", "folders", "space", "privileges", "packages", "clock"} <= set(lines)
            assert lines["executor"].ok, lines["executor"]
            assert lines["clock"].ok, lines["clock"]
            assert str(site.folder.parent) in lines["folders"].said or site.kind == "ssh"

    on_site(test)


def test_it_lists_its_nodes_in_order_with_their_facts(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        listed: b.Listed = await site.process.call("nodes", b.Nothing())
        assert [node.name for node in listed.nodes] == ["local-1", "local-2", "local-3"]
        assert {node.infrastructure for node in listed.nodes} == {"lab"}
        assert {name: listed.nodes[0].properties[name] for name in ("cpus", "site")} == {
            "cpus": 4 if site.cluster else 2,
            "site": "lab",
        }

    on_site(test)


def test_an_executor_runs_to_its_end_and_the_end_is_told(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("leave")
        seen = await site.until(target, b.Liveness.DEAD)
        assert seen.tail == "started d1"
        assert site.starts() == ["1"]

    on_site(test)


def test_what_was_never_launched_is_absent(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        assert (await site.look(site.target())).executor is b.Liveness.ABSENT

    on_site(test)


def test_a_second_launch_of_an_epoch_starts_nothing(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("stay")
        await asyncio.gather(*(site.launch("stay") for _ in range(5)))
        await site.up(target)
        site.kill(target)
        await site.until(target, b.Liveness.DEAD)
        await site.launch("stay")
        assert (await site.look(target)).executor is b.Liveness.DEAD
        assert site.starts() == ["1"]

    on_site(test)


def test_a_new_epoch_starts_anew_beside_the_old_one(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        first = await site.launch("crash")
        assert "RuntimeError: boom" in (await site.until(first, b.Liveness.DEAD)).tail
        second = await site.launch("stay", site.target(epoch=2))
        await site.up(second)
        assert (await site.look(second)).executor is b.Liveness.ALIVE
        assert (await site.look(first)).executor is b.Liveness.DEAD

    on_site(test)


@pytest.mark.parametrize("what", ["stay", "stubborn"])
def test_stop_ends_an_executor_whatever_it_does(on_site: Callable[[Test], None], what: str) -> None:
    async def test(site: Site) -> None:
        target = await site.launch(what)
        await site.up(target)
        stopped: b.Stopped = await site.process.call("stop", target)
        assert stopped.tail.splitlines()[0] == "started d1"  # Slurm adds what it did
        assert (await site.look(target)).executor is b.Liveness.DEAD
        await site.process.call("stop", target)
        await site.process.call("stop", site.target("never-launched"))

    on_site(test)


@pytest.mark.parametrize("on_site", ["local", "ssh"], indirect=True)  # Slurm tells nobody: it is looked at
def test_a_killed_executor_is_noticed_without_being_looked_at(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("stay")
        await site.up(target)
        site.kill(target)
        assert await asyncio.wait_for(site.notices.get(), PATIENCE) == "d1"
        assert (await site.look(target)).executor is b.Liveness.DEAD

    if hasattr(os, "pidfd_open"):
        on_site(test)


def test_an_executor_outlives_its_connector_and_is_found_again(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("stay")
        await site.up(target)
        await site.process.close()
        site.restarted()
        assert (await site.look(target)).executor is b.Liveness.ALIVE
        await site.launch("stay")
        site.kill(target)
        await site.until(target, b.Liveness.DEAD)
        assert site.starts() == ["1"]

    on_site(test)


def test_an_executor_is_alive_while_it_holds_its_lock_though_nobody_noted_it(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("stay")
        await site.up(target)
        noted = site.noted(target)
        hidden = noted.rename(noted.with_suffix(".hidden"))
        assert (await site.look(target)).executor is b.Liveness.ALIVE
        site.end(hidden)
        await site.until(target, b.Liveness.DEAD)

    on_site(test)


def test_a_dead_executors_journal_is_drained_with_a_fresh_launch(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("leave")
        await site.until(target, b.Liveness.DEAD)
        await site.process.call("drain", drain_of(target))
        await site.process.call("drain", drain_of(site.target("never-launched")))
        assert site.drains() == ["http://anew"]
        with pytest.raises(ConnectorError, match="the journal is damaged"):
            await site.process.call("drain", drain_of(target, "undrainable"))

    on_site(test)


def test_clean_up_leaves_nothing(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("leave")
        await site.until(target, b.Liveness.DEAD)
        locked = site.folder / "d1" / "1" / "steps"
        (locked / "inner").mkdir(parents=True)
        locked.chmod(0o000)
        later = await site.launch("leave", site.target(epoch=2))
        await site.until(later, b.Liveness.DEAD)
        await site.process.call("clean_up", later)
        await site.process.call("clean_up", later)
        assert list(site.folder.iterdir()) == []

    on_site(test)


def test_an_environment_that_cannot_be_made_says_why(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        for packages in (("possible",), ("impossible",)):
            wanted = environment(Venv(requirements=Requirements(packages=packages)))
            call = site.process.call("prepare", b.PrepareRequest(target=site.target(), environment=wanted))
            if packages == ("possible",):
                assert Path((await call).prepared["python"]).name.startswith("python")
            else:
                with pytest.raises(ConnectorError, match="no matching distribution found for impossible"):
                    await call

    on_site(test)


def test_launch_files_are_for_their_user_alone(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("leave")
        await site.until(target, b.Liveness.DEAD)
        folder = site.folder / "d1" / "1"
        assert (folder / "launch.json").stat().st_mode & 0o777 == 0o600
        assert folder.stat().st_mode & 0o077 == 0
        assert (site.folder / "d1" / "1.log").stat().st_mode & 0o777 == 0o600

    on_site(test)


def test_a_chatty_executors_log_stays_bounded(on_site: Callable[[Test], None]) -> None:
    async def test(site: Site) -> None:
        target = await site.launch("chatty")
        await site.up(target)
        await site.look(target)
        assert (site.folder / "d1" / "1.log").stat().st_size < 1024 * 1024
        assert (await site.look(target)).executor is b.Liveness.ALIVE

    on_site(test)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 0}, "1 to 1000"),
        ({"nodes": "three"}, "number or a list"),
        ({"nodes": [{"name": "a"}, {"name": "a"}]}, "two nodes of one name"),
        ({"nodes": [{"properties": {}}]}, "object with a name"),
        ({"hosts": ["a"]}, "no option hosts"),
        ({"slots": 0}, "slots as a number"),
        ({"nodes": [{"name": "a", "slots": "two"}]}, "slots as a number"),
        ({"elastic": 0}, "1 to 1000 elastic"),
        ({"elastic": 2, "nodes": 2}, "not both"),
        ({"executable": "/nowhere"}, "There is no executor at /nowhere"),
    ],
)
def test_wrong_options_are_refused_with_what_is_wrong(
    tmp_path: Path, executable: Path, options: dict[str, Any], said: str
) -> None:
    async def test() -> None:
        fleet = ConnectorFleet(tmp_path, executable)
        with pytest.raises(ConnectorError, match=said) as caught:
            await fleet.survey("i1", "lab", "local", options)
        assert not caught.value.transient
        await fleet.close()

    asyncio.run(test())


def test_named_nodes_have_their_own_properties(tmp_path: Path, executable: Path) -> None:
    async def test() -> None:
        fleet = ConnectorFleet(tmp_path, executable)
        nodes = [{"name": "a", "properties": {"site": "east"}}, {"name": "b"}]
        options = {"nodes": nodes, "executable": str(STANDIN)}
        found = await fleet.survey("i1", "lab", "local", options)
        assert [(node.name, node.properties["site"]) for node in found.nodes] == [("a", "east"), ("b", "x")]
        await fleet.close()

    asyncio.run(test())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"nodes": 2, "slots": 3}, [("local-1", 3, None), ("local-2", 3, None)]),
        ({"nodes": [{"name": "a", "slots": 2}, {"name": "b"}]}, [("a", 2, None), ("b", 1, None)]),
        ({"elastic": 4, "prefix": "vm"}, [("vm", 1, Elastic(most=4))]),
    ],
)
def test_nodes_have_the_slots_they_were_given_and_a_template_its_limit(
    tmp_path: Path, executable: Path, options: dict[str, Any], expected: list[Any]
) -> None:
    async def test() -> None:
        fleet = ConnectorFleet(tmp_path, executable)
        found = await fleet.survey("i1", "lab", "local", {**options, "executable": str(STANDIN)})
        assert [(node.name, node.slots, node.elastic) for node in found.nodes] == expected
        await fleet.close()

    asyncio.run(test())


def test_what_a_connector_kept_goes_when_it_is_let_go_for_good(tmp_path: Path, executable: Path) -> None:
    async def test() -> None:
        fleet = ConnectorFleet(tmp_path, executable)
        kept = tmp_path / "i1" / "id_ed25519"
        await fleet.survey("i1", "lab", "local", {"nodes": 1})
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("a key")
        await fleet.drop("i1")
        assert kept.exists()
        await fleet.drop("i1", forget=True)
        assert not kept.parent.exists()
        await fleet.close()

    asyncio.run(test())


def test_a_kind_that_is_not_installed_is_refused_with_those_that_are(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(UnknownConnector, match="local"):
            await ConnectorFleet(tmp_path, STANDIN).survey("i1", "lab", "quantum", {})

    asyncio.run(test())
    assert "local" in kinds()
