"""The programs that are timed, each in a process of its own: ``python programs.py NAME [ARGUMENT]`` prints JSON.

They stand apart from what times them, so that nothing else is in memory: a parent's size is part of what a fork costs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import fieldlab as fl
import peers

SETTLE = 3.0  # seconds until an executor that has nothing to do is looked at
UP = "up"


# --- steps ------------------------------------------------------------------------------------------------------------


def steps(shape: str, isolation: str, folder: str) -> dict[str, float]:
    """``fl.run`` of a chain or a fan-out; journals and values go to ``folder``."""

    def run(count: int) -> None:
        results = fl.run(_dag(shape, count, isolation), folder=os.path.join(folder, str(count)))
        _require_all(results, count)

    return peers.difference(run)


def _dag(shape: str, count: int, isolation: str = "process", last: Any = None) -> fl.DAG:
    """A DAG of steps that do nothing; ``last``: a task for a step after all of them."""

    @fl.task
    def nothing() -> None:
        return None

    settings = {} if isolation == "process" else {"isolation": isolation}
    with fl.DAG(shape, **settings) as dag:
        made = [nothing()]
        for _ in range(count - 1):
            made.append(nothing().after(made[-1]) if shape == "chain" else nothing())
        if last is not None:
            last().named("last").after(*(made[-1:] if shape == "chain" else made))
    return dag


def _require_all(results: Any, count: int) -> None:
    ended = [results[name].status for name in results]
    if ended.count("succeeded") != count:
        raise SystemExit(f"only {ended.count('succeeded')} of {count} steps succeeded")


def growth(shape: str, folder: str) -> dict[str, float]:
    """Seconds per step up to 1,000 and up to 10,000 steps, and by how many bytes more the supervisor peaked."""
    seconds, peaks = {}, {}
    for count in (100, 1100, 10_100):
        dag = _dag(shape, count, last=fl.task(_peak_of_supervisor))
        begun = time.perf_counter()
        results = fl.run(dag, folder=os.path.join(folder, str(count)))
        seconds[count] = time.perf_counter() - begun
        _require_all(results, count + 1)
        peaks[count] = results["last"].value
    return {
        "few": (seconds[1100] - seconds[100]) / 1000,
        "many": (seconds[10_100] - seconds[100]) / 10_000,
        "memory": peaks[10_100] - peaks[1100],
    }


def _peak_of_supervisor() -> int:
    """Bytes that the supervisor of this step held at most: it is the one above the one that forks."""

    def field(pid: int, name: str) -> int:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

    return 1024 * field(field(os.getppid(), "PPid"), "VmHWM")


# --- plans and simulations --------------------------------------------------------------------------------------------


def plan(kinds: str) -> dict[str, float]:
    """Seconds to define, check and plan a chain of 10,000 steps for 100 nodes of so many kinds."""

    @fl.task
    def work(value: object) -> int:
        return 1

    @work.implementation(when=fl.node.architecture == "linux/arm64")
    def work_arm(value: object) -> int:
        return 2

    architectures = ["linux/amd64", "linux/arm64"][: int(kinds)]
    nodes = [fl.Node.dummy(f"n-{i}", architecture=architectures[i % len(architectures)]) for i in range(100)]
    begun = time.perf_counter()
    with fl.DAG("long") as dag:
        last = work(0)
        for _ in range(9_999):
            last = work(last)
    made = fl.plan(fl.Experiment("bench").map(dag, nodes))
    seconds = time.perf_counter() - begun
    if made.problems or len(made.choices) != 1_000_000:
        raise SystemExit(f"not planned: {made.problems[:1]}")
    return {"seconds": seconds}


def simulate(what: str) -> dict[str, float]:
    """Seconds to simulate 200 nodes: a ``chain`` of 500 steps, or a ``day`` with a step every minute."""

    @fl.task
    def probe() -> int:
        return 1

    with fl.DAG(what) as dag:
        if what == "day":
            fl.repeat(probe(), every="1m", duration="24h", on_failure="continue").after(fl.barrier("start"))
        else:
            last = probe()
            for _ in range(499):
                last = probe().after(last)
    experiment = fl.Experiment("bench").map(dag, [fl.Node.dummy(f"n-{i}") for i in range(200)])
    settings: dict[str, Any] = {"durations": {"probe": (1, 30)}, "outcomes": {"probe": 0.9 if what == "day" else 1.0}}
    begun = time.perf_counter()
    made = fl.simulate(experiment, **settings)
    seconds = time.perf_counter() - begun
    if made.state != "succeeded":
        raise SystemExit(f"it {made.state}: {made.findings[:1]}")
    return {"seconds": seconds, "changes": len(made.timeline)}


# --- an executor ------------------------------------------------------------------------------------------------------


def one_step() -> Any:
    """A DAG of one step that does nothing."""

    @fl.task
    def nothing() -> None:
        return None

    with fl.DAG("one") as dag:
        nothing()
    return dag


def asleep() -> Any:
    """A DAG that leaves its executor idle with one sleeping background step: what is during it waits for a timer."""

    @fl.task
    def idle(name: str, *, ctx: fl.TaskContext) -> None:
        ctx.events.send(name)
        ctx.ready()
        ctx.stopping.wait()

    @fl.task
    def tick() -> None:
        return None

    with fl.DAG("asleep") as dag:
        background = fl.background(idle(UP))
        fl.repeat(tick().during(background), every=3600, times=2)
    return dag


def run_one_step(folder: str) -> dict[str, float]:
    """The whole call of ``fl.run`` for one step; once before, so that the cache is warm."""

    def run(name: str) -> float:
        begun = time.perf_counter()
        fl.run(one_step(), folder=os.path.join(folder, name))
        return time.perf_counter() - begun

    run("first")
    return {"seconds": run("second")}


def idle(folder: str) -> None:
    """Hold an idle executor that ``fl.run`` started, over the pipe, until the input is closed; print its process."""
    experiment = fl.Experiment("idle").map(asleep(), fl.Node(name="here"))
    run = fl.run(experiment, folder=folder, wait=False)
    try:
        run.events.wait(UP, timeout=60)
        (supervisor,) = _children(os.getpid())
        print(supervisor, flush=True)
        sys.stdin.read()
    finally:
        run.cancel()
        run.close()


def idle_memory(folder: str) -> dict[str, int]:
    """Memory of such an executor."""
    experiment = fl.Experiment("idle").map(asleep(), fl.Node(name="here"))
    run = fl.run(experiment, folder=folder, wait=False)
    try:
        run.events.wait(UP, timeout=60)
        time.sleep(SETTLE)
        (supervisor,) = _children(os.getpid())
        return memory(supervisor)
    finally:
        run.cancel()
        run.close()


def memory(pid: int) -> dict[str, int]:
    """Bytes that a process holds, and those of it and everything below it (Linux: proc(5))."""
    tree = tree_of(pid)
    return {
        "supervisor": _field(pid, "Rss"),
        "tree": sum(_field(one, "Rss") for one in tree),
        "tree_pss": sum(_field(one, "Pss") for one in tree),
        "processes": len(tree),
    }


def tree_of(pid: int) -> list[int]:
    """A process, and everything below it."""
    tree = [pid]
    for one in tree:
        tree += _children(one)
    return tree


def activity(pid: int) -> tuple[int, int]:
    """How often threads of a process were switched to, and nanoseconds that they ran (Linux: proc(5))."""
    wakes = ran = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/status", encoding="ascii") as file:
            wakes += sum(int(line.split()[1]) for line in file if "voluntary_ctxt_switches:" in line)
        with open(f"/proc/{pid}/task/{task}/schedstat", encoding="ascii") as file:
            ran += int(file.read().split()[0])
    return wakes, ran


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
            found += map(int, file.read().split())
    return found


def _field(pid: int, name: str) -> int:
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


PROGRAMS: dict[str, Callable[..., Any]] = {
    "growth": growth,
    "idle": idle,
    "idle-memory": idle_memory,
    "one-step": run_one_step,
    "plan": plan,
    "simulate": simulate,
    "steps": steps,
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](*sys.argv[2:])))
