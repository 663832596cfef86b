"""A connector that misbehaves hurts its own callers, in time, and nobody else."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fieldlab_common.errors import ConnectorError
from fieldlab_director.connectors import base as b
from fieldlab_director.connectors.fleet import ConnectorFleet
from fieldlab_director.connectors.host import ConnectorProcess, kinds

EVIL = '''
"""A connector that does what its options say, for each method."""

import asyncio, fcntl, os, sys, time
from fieldlab_common.errors import ConnectorError
from fieldlab_common.node import Node
from fieldlab_director.connectors.base import Checked, Listed, Observations, Stopped

print("a word while it is imported")


def frames():
    """The pipe that belongs to the frames: what was standard output."""
    mine = {int(name): os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    pipes = [fd for fd, what in mine.items() if fd > 2 and "pipe:" in what]
    return next(fd for fd in pipes if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_WRONLY)


class Evil:
    observe_every = 7.0

    def __init__(self, opening, notice):
        self.options, self.notice = opening.options, notice
        if self.options.get("open") == "raise":
            raise ConnectorError("These options are wrong.", transient=False)

    async def act(self, method):
        how = self.options.get(method, "")
        print("a word before", method, flush=True)
        if how == "raise":
            raise ValueError("out of luck")
        if how == "refuse":
            raise ConnectorError("The key is wrong.", advice="Give another.", transient=False)
        if how == "hang":
            await asyncio.Event().wait()
        if how == "block":
            time.sleep(1000)
        if how == "die":
            print("I have had enough", file=sys.stderr, flush=True)
            os._exit(3)
        if how == "garbage":
            os.write(frames(), b"this is no frame")
        if how == "notice":
            self.notice("d7")
        if how == "cancellable":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.notice("cancelled")
                raise

    async def check(self, request):
        await self.act("check")
        return Checked()

    async def nodes(self, request):
        await self.act("nodes")
        return Listed(nodes=(Node(name="n1"), Node(name="n2")))

    async def observe(self, request):
        await self.act("observe")
        return Observations()

    async def stop(self, target):
        await self.act("stop")
        return "stopped"

    async def close(self):
        pass
'''


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A connector of another distribution, found by its entry point."""
    site = tmp_path / "site"
    info = site / "evil-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "evil_connector.py").write_text(EVIL)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fieldlab.connectors]\nevil = evil_connector:Evil\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(str(site))
    return "evil"


NOTHING = b.Nothing()
Notices = list[str | None]


def with_connector(
    kind: str, options: dict[str, str], test: Callable[[ConnectorProcess, Notices], Awaitable[None]], **more: float
) -> None:
    async def run() -> None:
        opening = b.Opening(infrastructure="lab", folder="/nowhere", executable="", options=options)
        notices: Notices = []
        ping_within = more.pop("ping_within", 20.0)
        process = ConnectorProcess(kind, opening, notice=notices.append, deadlines=more, ping_within=ping_within)
        try:
            async with asyncio.timeout(60):
                await test(process, notices)
        finally:
            await process.close()

    asyncio.run(run())


def test_a_connector_of_another_distribution_is_found_and_what_it_prints_hurts_nothing(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        listed: b.Listed = await process.call("nodes", NOTHING)
        assert [node.name for node in listed.nodes] == ["n1", "n2"]
        assert await process.observe_every() == 7.0

    assert evil in kinds()
    with_connector(evil, {}, test)


@pytest.mark.parametrize(
    ("how", "said", "transient"),
    [
        ("raise", "ValueError: out of luck", True),
        ("refuse", "The key is wrong. Give another.", False),
        ("hang", "took longer than its 0.2 s", True),
        ("die", "I have had enough", True),
        ("garbage", "has died", True),
    ],
)
def test_what_goes_wrong_is_an_error_and_the_next_call_works(evil: str, how: str, said: str, transient: bool) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        with pytest.raises(ConnectorError) as caught:
            await process.call("check", NOTHING)
        assert said in str(caught.value)
        assert caught.value.transient is transient
        await process.call("nodes", NOTHING)

    with_connector(evil, {"check": how}, test, check=0.2)


def test_a_blocked_connector_is_killed_and_all_that_wait_for_it_are_told(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        calls = [process.call("observe", b.ObserveRequest()), process.call("check", NOTHING)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, ConnectorError) and result.transient for result in results)
        await process.call("nodes", NOTHING)

    with_connector(evil, {"check": "block", "observe": "hang"}, test, check=0.2, observe=1000.0)


def test_a_blocked_connector_is_found_by_a_ping_however_long_its_deadline(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        with pytest.raises(ConnectorError, match="did not answer ping"):
            await process.call("check", NOTHING)

    with_connector(evil, {"check": "block"}, test, check=1000.0, ping_within=0.3)


def test_options_that_the_connector_refuses_are_an_error(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        with pytest.raises(ConnectorError, match="These options are wrong") as caught:
            await process.call("nodes", NOTHING)
        assert not caught.value.transient

    with_connector(evil, {"open": "raise"}, test)


def test_a_connector_that_dies_again_and_again_is_started_less_and_less_often(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        said = []
        for _ in range(3):
            with pytest.raises(ConnectorError) as caught:
                await process.call("check", NOTHING)
            said.append(str(caught.value))
        assert "had enough" in said[0]
        assert "had enough" in said[1]
        assert "died 2 times in a row and is started again" in said[2]

    with_connector(evil, {"check": "die"}, test)


def test_an_answer_of_another_form_is_an_error(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        with pytest.raises(ConnectorError, match="something else"):
            await process.call("stop", b.Target(deployment="d", node="n"))

    with_connector(evil, {}, test)


def test_a_notice_arrives_and_so_does_the_loss_of_the_process(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        await process.call("nodes", NOTHING)
        assert notices == ["d7"]
        with pytest.raises(ConnectorError):
            await process.call("check", NOTHING)
        await process.call("nodes", NOTHING)
        assert notices == ["d7", None, "d7"]

    with_connector(evil, {"nodes": "notice", "check": "die"}, test)


def test_a_caller_that_gives_up_cancels_the_work(evil: str) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        call = asyncio.create_task(process.call("check", NOTHING))
        await process.call("nodes", NOTHING)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await process.call("nodes", NOTHING)
        assert notices == ["cancelled"]

    with_connector(evil, {"check": "cancellable"}, test)


def test_a_hanging_connector_does_not_delay_another_one(evil: str, tmp_path: Path, executable: Path) -> None:
    async def test(process: ConnectorProcess, notices: Notices) -> None:
        hanging = asyncio.create_task(process.call("check", NOTHING))
        fleet = ConnectorFleet(tmp_path, executable)
        assert len((await fleet.survey("i1", "other", "local", {"nodes": 2})).nodes) == 2
        assert not hanging.done()
        await fleet.close()
        hanging.cancel()

    with_connector(evil, {"check": "block"}, test)


def test_it_ends_when_its_input_ends() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "fieldlab_director.connectors.host", "local"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_it_ends_with_the_director_even_when_that_is_killed() -> None:
    script = """
import asyncio, os, signal
from fieldlab_director.connectors import base as b
from fieldlab_director.connectors.host import ConnectorProcess
async def main():
    opening = b.Opening(infrastructure="lab", folder="/nowhere", executable="")
    process = ConnectorProcess("local", opening, notice=lambda _: None)
    await process.observe_every()
    print(process.channel.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    director = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    output, _ = director.communicate(timeout=60)
    assert director.returncode == -signal.SIGKILL
    try:
        descriptor = os.pidfd_open(int(output))
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 30)[0]
    os.close(descriptor)
