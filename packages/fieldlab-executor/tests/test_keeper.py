"""A keeper, spoken to as a connector does: what it starts outlives it, and is started once, whoever asks."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fieldlab_common import wire
from fieldlab_common.errors import ConnectorError
from fieldlab_common.keeping import (
    METHODS,
    DrainRequest,
    Frames,
    KeeperOpening,
    LaunchRequest,
    Liveness,
    Nothing,
    ObserveRequest,
    PrepareRequest,
    Target,
    error_of,
    frame,
)
from fieldlab_common.messages import Launch, Tagged
from fieldlab_executor import processes

PATIENCE = 60.0
NOWHERE = "http://127.0.0.1:9"  # nothing listens there: an executor goes on asking for its claim


class Keeper:
    """A keeper process, and what it said so far."""

    def __init__(self, root: str, env: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fieldlab_executor", "keep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env},
        )
        self._frames, self._numbers = Frames(), itertools.count(1)
        self.answers: dict[int, Any] = {}
        self.notices: list[str] = []
        self.result(self.send("open", wire.encode(KeeperOpening(root=root))))

    def send(self, method: str, body: Any) -> int:
        number = next(self._numbers)
        assert self.process.stdin is not None
        self.process.stdin.write(frame({"id": number, "method": method, "body": body, "deadline": PATIENCE}))
        self.process.stdin.flush()
        return number

    def hear(self, seconds: float = PATIENCE) -> None:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], seconds)[0], "the keeper says nothing"
        for message in self._frames.feed(os.read(self.process.stdout.fileno(), 65536)):
            if "notice" in message:
                self.notices.append(message["notice"])
            else:
                self.answers[message["id"]] = message

    def result(self, number: int) -> Any:
        while number not in self.answers:
            self.hear()
        if "error" in self.answers[number]:
            raise error_of(self.answers[number]["error"])
        return self.answers[number]["body"]

    def call(self, method: str, request: Any) -> Any:
        return wire.decode(METHODS[method][1], self.result(self.send(method, wire.encode(request))))

    def liveness(self, target: Target) -> Liveness:
        return self.call("observe", ObserveRequest(targets=(target,))).observations[0].executor

    def starters(self) -> list[int]:
        return processes.children(self.process.pid)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(PATIENCE) == 0


Make = Callable[[], Keeper]


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[Make]:
    """Makes keepers of one root, on a node whose state is kept below the test's folder."""
    made: list[Keeper] = []

    def make() -> Keeper:
        made.append(Keeper("lab", {"XDG_STATE_HOME": str(tmp_path)}))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()
        one.process.wait()
    for noted in (tmp_path / "fieldlab" / "lab").glob("*/*.pid"):
        processes.send([json.loads(noted.read_text())["pid"]], signal.SIGKILL)


def target(name: str = "d1", epoch: int = 1) -> Target:
    return Target(deployment=name, node="n", epoch=epoch)


def launch_of(one: Target) -> LaunchRequest:
    launch = Launch(director=NOWHERE, token="t", experiment="e", deployment=one.deployment, epoch=one.epoch)
    return LaunchRequest(target=one, launch=launch)


def pid_of(root: Path, one: Target) -> int:
    return int(json.loads((root / "fieldlab" / "lab" / one.deployment / f"{one.epoch}.pid").read_text())["pid"])


def await_that(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.01)


def await_end(pid: int) -> None:
    await_that(lambda: (one := processes.process(pid)) is None or not one.alive)


def test_it_tells_what_its_node_is(keeper: Make) -> None:
    one = keeper()
    (node,) = one.call("nodes", Nothing()).nodes
    assert (node.os, node.properties["hostname"]) == (sys.platform, os.uname().nodename)


def test_an_executor_is_forked_from_the_starter_and_ends_when_it_is_told_to(keeper: Make, tmp_path: Path) -> None:
    one = keeper()
    one.call("prepare", PrepareRequest(target=target(), environment=Tagged(kind="host")))
    one.call("launch", launch_of(target()))
    pid = pid_of(tmp_path, target())
    await_that(lambda: (tmp_path / "fieldlab" / "lab" / "d1" / "1" / "lock").exists())  # it has come so far
    executor = processes.process(pid)
    assert executor is not None
    assert executor.parent in one.starters()
    assert executor.session == pid
    assert one.liveness(target()) is Liveness.ALIVE
    one.call("stop", target())
    assert one.liveness(target()) is Liveness.DEAD
    one.call("clean_up", target())
    assert one.liveness(target()) is Liveness.ABSENT


def test_an_executor_outlives_its_keeper_and_the_next_one_finds_it(keeper: Make, tmp_path: Path) -> None:
    first = keeper()
    first.call("launch", launch_of(target()))
    starters = first.starters()
    first.close()
    for pid in starters:
        await_end(pid)
    second = keeper()
    second.call("launch", launch_of(target()))
    assert second.liveness(target()) is Liveness.ALIVE
    os.kill(pid_of(tmp_path, target()), signal.SIGKILL)
    while not second.notices:
        second.hear()
    assert (second.notices, second.liveness(target())) == (["d1"], Liveness.DEAD)


def test_two_keepers_of_one_root_start_an_epoch_once(keeper: Make, tmp_path: Path) -> None:
    both = [keeper(), keeper()]
    calls = [(one, one.send("launch", wire.encode(launch_of(target())))) for one in both]
    for one, number in calls:
        one.result(number)
    parents = [one.starters() for one in both]
    executor = processes.process(pid_of(tmp_path, target()))
    assert executor is not None
    below = [pid for starters in parents for starter in starters for pid in processes.children(starter)]
    assert below == [executor.pid]


def test_where_the_starter_has_died_executors_start_all_the_same(keeper: Make, tmp_path: Path) -> None:
    one = keeper()
    one.call("launch", launch_of(target("d1")))
    (starter,) = one.starters()
    os.kill(starter, signal.SIGKILL)
    await_end(starter)
    one.call("launch", launch_of(target("d2")))
    one.call("launch", launch_of(target("d3")))
    assert {one.liveness(target(name)) for name in ("d1", "d2", "d3")} == {Liveness.ALIVE}


def test_a_dead_executor_without_a_journal_has_nothing_to_drain(keeper: Make) -> None:
    one = keeper()
    one.call("drain", DrainRequest(target=target(), launch=launch_of(target()).launch))


@pytest.mark.parametrize("name", ["../up", "", "a/b", "x" * 65])
def test_a_deployment_cannot_name_a_folder_elsewhere(keeper: Make, name: str) -> None:
    with pytest.raises(ConnectorError, match="cannot be the name of a folder"):
        keeper().call("launch", launch_of(target(name)))


def test_it_leaves_when_what_it_hears_is_no_frame(keeper: Make) -> None:
    one = keeper()
    assert one.process.stdin is not None
    one.process.stdin.write(b"GET / HTTP/1.1\r\n\r\n")
    one.process.stdin.flush()
    assert one.process.wait(PATIENCE) == 0
