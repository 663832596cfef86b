"""The programs that are timed, each in a process of its own: ``python programs.py NAME [ARGUMENT]`` prints JSON.

They stand apart from what times them, so that nothing else is in memory: a parent's size is part of what a fork costs.
``netunicorn`` runs on the interpreter of its own environment, hence nothing of fieldlab is imported up here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

SHORT, LONG = 100, 1100  # steps; the difference leaves out what does not grow with the chain
SETTLE = 3.0  # seconds until an executor that has nothing to do is looked at
UP = "up"


def _difference(run: Callable[[int], float]) -> dict[str, float]:
    run(3)
    short, long = run(SHORT), run(LONG)
    return {"short": short, "long": long, "per_step": (long - short) / (LONG - SHORT)}


# --- chains -----------------------------------------------------------------------------------------------------------


def chain_fork(_: str) -> dict[str, float]:
    """Bare fork + pipe + wait: the least that a process for each step can cost in Python."""

    def run(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            end, start = os.pipe()
            pid = os.fork()
            if not pid:
                os.write(start, b"done")
                os._exit(0)
            os.close(start)
            os.read(end, 16)
            os.close(end)
            os.waitpid(pid, 0)
        return time.perf_counter() - begun

    return _difference(run)


def _nothing() -> None:
    return None


def chain_pool(_: str) -> dict[str, float]:
    """``ProcessPoolExecutor``, one call after another: its processes are used again."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1) as pool:

        def run(count: int) -> float:
            begun = time.perf_counter()
            for _ in range(count):
                pool.submit(_nothing).result()
            return time.perf_counter() - begun

        return _difference(run)


def chain_fieldlab(folder: str) -> dict[str, float]:
    """``fl.run`` of a chain; journals and values go to ``folder``."""
    import fieldlab as fl

    @fl.task
    def nothing() -> None:
        return None

    def run(count: int) -> float:
        with fl.DAG("chain") as dag:
            last = nothing()
            for _ in range(count - 1):
                last = nothing().after(last)
        begun = time.perf_counter()
        results = fl.run(dag, folder=os.path.join(folder, str(count)))
        seconds = time.perf_counter() - begun
        ended = [results[name].status for name in results]
        if ended.count("succeeded") != count:
            raise SystemExit(f"only {ended.count('succeeded')} of {count} steps succeeded")
        return seconds

    return _difference(run)


def chain_netunicorn(count: str) -> dict[str, float]:
    """netunicorn's executor with a pipeline of ``count`` tasks, without a gateway and without a heartbeat."""
    from netunicorn.base.pipeline import Pipeline  # type: ignore[import-not-found]
    from netunicorn.base.task import Task  # type: ignore[import-not-found]
    from netunicorn.executor.executor import Executor  # type: ignore[import-not-found]

    class Nothing(Task):  # type: ignore[misc]
        def run(self) -> None:
            return None

    executor = Executor("bench", gateway_endpoint="http://127.0.0.1:9", heartbeat=False)
    executor.execution_graph = Pipeline([Nothing() for _ in range(int(count))], report_results=False)
    begun = time.perf_counter()
    executor()
    seconds = time.perf_counter() - begun
    done = sum(map(len, executor.step_results.values()))
    if done != int(count):
        raise SystemExit(f"only {done} of {count} tasks ran")
    return {"long": seconds, "per_step": seconds / int(count)}


# --- an executor ------------------------------------------------------------------------------------------------------


def one_step() -> Any:
    """A DAG of one step that does nothing."""
    import fieldlab as fl

    @fl.task
    def nothing() -> None:
        return None

    with fl.DAG("one") as dag:
        nothing()
    return dag


def asleep() -> Any:
    """A DAG that leaves its executor idle with one sleeping background step: what is during it waits for a timer."""
    import fieldlab as fl

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
    import fieldlab as fl

    def run(name: str) -> float:
        begun = time.perf_counter()
        fl.run(one_step(), folder=os.path.join(folder, name))
        return time.perf_counter() - begun

    run("first")
    return {"seconds": run("second")}


def idle(folder: str) -> dict[str, int]:
    """Memory of an executor that ``fl.run`` started, over the pipe."""
    import fieldlab as fl

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
    tree = [pid]
    for one in tree:
        tree += _children(one)
    return {
        "supervisor": _field(pid, "Rss"),
        "tree": sum(_field(one, "Rss") for one in tree),
        "tree_pss": sum(_field(one, "Pss") for one in tree),
        "processes": len(tree),
    }


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


PROGRAMS: dict[str, Callable[[str], Any]] = {
    "chain-fieldlab": chain_fieldlab,
    "chain-fork": chain_fork,
    "chain-netunicorn": chain_netunicorn,
    "chain-pool": chain_pool,
    "idle": idle,
    "one-step": run_one_step,
}

if __name__ == "__main__":
    print(json.dumps(PROGRAMS[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "")))
