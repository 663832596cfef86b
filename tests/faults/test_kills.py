"""Rounds of ``kill -9`` under load, at moments that a seed picks: director, executor, spawner.

After each round: nothing that was acknowledged is missing, nothing is doubled, the order is kept, the run has ended.
``FIELDLAB_TEST_ROUNDS`` says how many rounds there are; a round that failed is played again by its number.
"""

from __future__ import annotations

import collections
import os
import random
import re
import select
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry
from fieldlab_director import Embedded, embedded

ROUNDS = int(os.environ.get("FIELDLAB_TEST_ROUNDS", "3"))
VICTIMS = ("director", "executor", "spawner")
TICKS = 60
NODES = ["a", "b", "c"]
Records = Callable[[fl.Run, Lane], list[RecordEntry]]


@fl.task
def work(ticks: int, *, ctx: fl.TaskContext) -> int:
    for number in range(ticks):
        print(number, flush=True)
        ctx.events.send("tick", {"number": number, "spawner": os.getppid()})
    ctx.events.wait("enough", timeout=100)
    return ticks


@pytest.fixture(scope="module")
def director(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedded]:
    with embedded(tmp_path_factory.mktemp("kills") / "director", nodes=NODES) as running:
        yield running


def kill(victim: str, director: Embedded, pids: dict[str, int]) -> None:
    """End the victim as a crash would, and see it gone."""
    if victim == "director":
        director.restart()
        return
    try:
        handle = os.pidfd_open(pids[victim])
    except ProcessLookupError:  # it has ended already, with one that was killed before
        return
    try:
        if (
            Path(f"/proc/{pids[victim]}/cwd").resolve().is_relative_to(director.folder.resolve())
        ):  # it is still that one
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            assert select.select([handle], [], [], 30)[0]
    finally:
        os.close(handle)


def processes(run: fl.Run, ticks: list[fl.Event], records: Records, chance: random.Random) -> dict[str, int]:
    """The executor of one deployment, and its spawner."""
    deployment = chance.choice(sorted({event.sender or "" for event in ticks}))
    spawner = next(event.data["spawner"] for event in ticks if event.sender == deployment)
    started = [
        e.record.body for e in records(run, Lane.CONTROL) if (e.deployment, e.record.kind) == (deployment, "started")
    ]
    return {"spawner": spawner, "executor": started[0]["pid"]}


def acknowledged(director: Embedded) -> dict[tuple[str, Lane], int]:
    """What each executor holds for acknowledged, by the name of its deployment and lane."""
    with sqlite3.connect(f"file:{director.folder / 'director.db'}?mode=ro", uri=True) as database:
        names = dict(database.execute("SELECT id, name FROM deployments"))
    found = {}
    for path in director.folder.rglob("journal/*/acked"):
        deployment = next((names[part] for part in path.parts if part in names), None)
        if deployment is not None:
            found[deployment, Lane(path.parent.name)] = int(
                (path.read_text().split() or ["0"])[0]
            )  # empty: just being written
    return found


@pytest.mark.parametrize("number", range(ROUNDS))
def test_whoever_is_killed_nothing_acknowledged_is_missing_or_doubled(
    director: Embedded, records: Records, number: int
) -> None:
    chance = random.Random(number)
    with fl.DAG("work") as dag:
        work(TICKS)
    with fl.Client(director.url, token=director.token) as client:
        run = client.submit(fl.Experiment(f"round-{number}").map(dag, client.nodes(), name=f"{{node}}-{number}"))
        acked: dict[tuple[str, Lane], int] = collections.defaultdict(int)
        moments = sorted(chance.sample(range(1, TICKS), 2))
        for mark, (moment, victim) in enumerate(
            zip(moments, [VICTIMS[number % 3], chance.choice(VICTIMS)], strict=True)
        ):
            ticks = run.events.wait("tick", count=moment, timeout=60)
            run.events.send("mark", mark)
            for key, through in acknowledged(director).items():
                acked[key] = max(acked[key], through)
            kill(victim, director, processes(run, ticks, records, chance))
        run.events.send("enough")
        assert run.wait(timeout=90).terminal
        check_numbers(run, records, acked)
        check_events(run)
        check_logs(run)


def check_numbers(run: fl.Run, records: Records, acked: dict[tuple[str, Lane], int]) -> None:
    for lane in Lane:
        numbers: dict[str, list[int]] = collections.defaultdict(list)
        for entry in records(run, lane):
            numbers[entry.deployment].append(entry.number)
        for deployment, found in numbers.items():
            assert found == list(range(1, len(found) + 1)), (lane, deployment)
            assert len(found) >= acked[deployment, lane]


def check_events(run: fl.Run) -> None:
    events = list(run.events.stream(timeout=0))
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.data for event in events if event.name == "mark"] == [0, 1]
    ticks: dict[str, list[int]] = collections.defaultdict(list)
    for event in events:
        if event.name == "tick":
            ticks[event.sender or ""].append(event.data["number"])
    for deployment, found in ticks.items():
        assert found == list(range(len(found)))
        assert len(found) == TICKS or run.results[deployment].state != "succeeded"


def check_logs(run: fl.Run) -> None:
    for name, deployment in run.results.items():
        step = deployment["work"]
        lines = re.findall(r"^\d+$", str(step.logs), re.MULTILINE)
        assert list(map(int, lines)) == list(range(len(lines))), name
        if step.status is fl.StepState.SUCCEEDED:
            assert (len(lines), step.value) == (TICKS, TICKS)
