"""Many executors on one director: a thousand that run, and ten thousand deployments that a restart finds.

The executors are played (``director.Played``) by this program over real HTTP, two connections each, as real ones have:
a poll that is held is their sign of life; their logs go by the bulk lane, and their ten steps by the control lane.
Meanwhile a user's client, in a process of its own, asks what a user asks.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import director as d
import fieldlab as fl
import programs
from fieldlab_common.events import START
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState
from fieldlab_common.protocol import Ended
from fieldlab_common.records import LogRecord, Ready, StepRecord
from measure import Row, Versions, work

__all__ = ["fleet", "restart"]

EXECUTORS = 1000
STEPS = 10
STEP = 10.0  # seconds of a step, from half to one and a half of it
LINES = 2  # log records of a step
POLL = 25.0  # seconds that an executor's poll is held, as ``link.Pace`` has it
PAUSE = 0.2  # seconds between two calls of the user
UNFINISHED, RUNS = 10_000, 10  # deployments that a restart finds, in so many experiments
CLAIMING = 16  # claims under way at once
READY = 120.0  # seconds for one of them to be prepared


# --- a thousand executors ---------------------------------------------------------------------------------------------


def fleet(rounds: int, versions: Versions) -> list[Row]:
    """What a thousand executors cost the director and its users; a round is one experiment of theirs."""
    folder = work("fleet")
    found = []
    for number in range(rounds):
        with d.serving(folder / str(number)) as director, fl.Client(director.url, director.token) as client:
            found.append(asyncio.run(_fleet(director, client)))
    shutil.rmtree(folder)

    def of(name: str) -> list[float]:
        return [one[name] for one in found]

    calls = [1000 * call for one in found for call in one["calls"]]
    note = (
        f"{EXECUTORS} executors, {STEPS} steps each; {sum(of('records')):.0f} records, all acknowledged; "
        f"{statistics.median(of('cpu')):.0%} of a core; {len(calls)} calls of the client"
    )
    return [
        Row(name="launched and claimed, all executors", unit="s", samples=of("claimed")),
        Row(name="until the last was told to begin", unit="s", samples=of("told")),
        Row(name="a client's call meanwhile, p50", unit="ms", samples=[statistics.median(calls)]),
        Row(
            name="a client's call meanwhile, p99", unit="ms", samples=[statistics.quantiles(calls, n=100)[98]], aim=100
        ),
        Row(name="director, resident at most", unit="MB", samples=of("memory"), aim=300, note=note),
        Row(name="a report, p99", unit="ms", samples=of("report")),
    ]


async def _fleet(director: d.Embedded, client: fl.Client) -> dict[str, Any]:
    begin = time.perf_counter()
    with d.simulated(client, EXECUTORS) as lab:
        run = await asyncio.to_thread(client.submit, fl.Experiment("fleet").map(programs.one_step(), lab.nodes))
        executors = [Crowded(await lab.launch()) for _ in range(EXECUTORS)]
        await asyncio.gather(*(executor.claim() for executor in executors))
        claimed = time.perf_counter() - begin
        user = _calls(director, "fleet")
        used, begin = d.cpu(director.pid), time.perf_counter()
        async with asyncio.timeout(10 * STEP * STEPS):
            counts = await asyncio.gather(*(executor.live() for executor in executors))
        cpu = (d.cpu(director.pid) - used) / (time.perf_counter() - begin)
        calls = json.loads(user.communicate(b"\n", d.WAIT)[0])
        state = await asyncio.to_thread(run.wait, d.WAIT)
    if state.value != "succeeded":
        raise RuntimeError(f"the fleet's experiment ended as {state.value}")
    times = [1000 * one for executor in executors for one in executor.times]
    return {
        "claimed": claimed,
        "calls": calls,
        "cpu": cpu,
        "records": sum(counts),
        "told": max(executor.waited for executor in executors),
        "report": statistics.quantiles(times, n=100)[98],
        "memory": d.resident(director.pid, "VmHWM") / 1e6,
    }


class Crowded(d.Played):
    """An executor that lives as real ones do: a long-poll on a connection of its own, and reports on another."""

    def __init__(self, launch: d.Launch) -> None:
        super().__init__(launch)
        self.times: list[float] = []
        self.waited = 0.0  # seconds from when it was ready until it was told to begin
        self._begin = asyncio.Event()

    async def live(self) -> int:
        """Run all steps; how many records were acknowledged."""
        polling = asyncio.create_task(self._listen())
        await self._tell("control", d.record("ready", time.time(), Ready(bound=0.01)))
        ready = time.perf_counter()
        await self._begin.wait()
        self.waited = time.perf_counter() - ready
        await asyncio.sleep(random.uniform(0, STEP))
        for number in range(STEPS):
            name = f"step-{number}"
            await self._tell("control", _step(name, StepState.RUNNING))
            for _ in range(LINES):
                await asyncio.sleep(random.uniform(0.5, 1.5) * STEP / LINES)
                await self._tell("bulk", d.record("log", time.time(), LogRecord(step=name, text="rtt 12.8 ms\n" * 8)))
            await self._tell("control", _step(name, StepState.SUCCEEDED))
        ended = Ended(state=DeploymentState.SUCCEEDED, reason=Reason.COMPLETED, bulk=self.numbers["bulk"])
        await self._tell("control", d.record("ended", time.time(), ended))
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
        self.close()
        return sum(self.numbers.values())

    async def _tell(self, lane: str, *records: bytes) -> None:
        begin = time.perf_counter()
        await self.say(lane, *records)
        self.times.append(time.perf_counter() - begin)

    async def _listen(self) -> None:
        line, cursor = d.Played(self.launch), 0
        try:
            while True:
                told = await line.poll(cursor, POLL)
                cursor = told["cursor"]
                if any(event["name"] == START for event in told["events"]):
                    self._begin.set()
        finally:
            line.close()


def _step(name: str, state: StepState) -> bytes:
    at = time.time()
    over = state is not StepState.RUNNING
    return d.record(
        "step", at, StepRecord(step=name, state=state, settled=over, started=at, ended=at if over else None)
    )


def _calls(director: d.Embedded, experiment: str) -> subprocess.Popen[bytes]:
    """A user's client at work until its input has a line: it prints how long each call took."""
    command = [sys.executable, __file__, director.url, director.token, experiment]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _user(url: str, token: str, experiment: str) -> None:
    import select

    taken: list[float] = []
    with fl.Client(url, token) as client:
        run = client.run(experiment)
        calls = (
            client.whoami,
            client.nodes,
            client.experiments,
            lambda: run.status,
            lambda: run.events.latest("none"),
            lambda: next(run.logs(follow=True), None),
        )
        while not select.select([sys.stdin], [], [], PAUSE)[0]:
            begin = time.perf_counter()
            random.choice(calls)()
            taken.append(time.perf_counter() - begin)
    print(json.dumps(taken))


# --- ten thousand deployments, and a restart --------------------------------------------------------------------------


def restart(rounds: int, versions: Versions) -> list[Row]:
    """How soon a director that was killed amid 10,000 launches answers, and launches what was left."""
    folder = work("restart")
    found = [asyncio.run(_restart(folder / str(number))) for number in range(rounds)]
    shutil.rmtree(folder)
    note = f"{RUNS} experiments; most deployments run, the rest is to be launched when the director is killed"
    return [
        Row(name=f"restart with {UNFINISHED} deployments: answers", unit="s", samples=[one[0] for one in found]),
        Row(name="the same: reconciles", unit="s", samples=[max(one) for one in found], aim=5, note=note),
    ]


async def _restart(folder: Path) -> tuple[float, float]:
    """Seconds until it answers, and until it has launched something, of what is left to be launched."""
    with (
        d.serving(folder) as director,
        fl.Client(director.url, director.token) as client,
        d.simulated(client, UNFINISHED) as lab,
    ):
        for number in range(RUNS - 1):
            _submit(client, lab, number)
            await _claim(lab, UNFINISHED // RUNS)
        last = _submit(client, lab, RUNS - 1)
        _until_ready(last)
        last.start()
        director.kill()
        lab.forget()
        begin = time.perf_counter()
        director.start()
        answers = time.perf_counter() - begin
        await lab.launch()
        return answers, time.perf_counter() - begin


def _until_ready(run: fl.Run) -> None:
    deadline = time.monotonic() + READY
    while run.status is ExperimentState.PREPARING:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{run.name} was not ready within {READY:g} s")
        time.sleep(0.2)


def _submit(client: fl.Client, lab: d.Simulation, number: int) -> fl.Run:
    """A part of the nodes as a run; the last is made ready and left there."""
    each = UNFINISHED // RUNS
    described = fl.Experiment(f"restart-{number}").map(programs.one_step(), lab.nodes[number * each :][:each])
    return client.prepare(described) if number == RUNS - 1 else client.submit(described)


async def _claim(lab: d.Simulation, count: int) -> None:
    """Claim so many launches, a few at a time, and let them be."""
    places = asyncio.Semaphore(CLAIMING)

    async def claim(executor: d.Played) -> None:
        async with places:
            await executor.claim()
            executor.close()

    async with asyncio.TaskGroup() as claims:
        for _ in range(count):
            claims.create_task(claim(d.Played(await lab.launch())))


if __name__ == "__main__":
    _user(*sys.argv[1:])
