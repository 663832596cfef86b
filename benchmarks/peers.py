"""The peers, each on the interpreter of its own environment: ``python peers.py PEER SHAPE FOLDER`` prints JSON.

SHAPE is ``chain`` (each task needs the one before) or ``fanout`` (none needs another). Every task does nothing. A peer
is used as its documentation says for one machine, with a worker per core, and nothing of fieldlab is imported here.
The time is that of the tasks alone: cluster and workers are up before, and one short run has warmed them.
``netunicorn idle FOLDER`` instead holds an executor of theirs that has nothing to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

SHORT, LONG = 100, 1100  # tasks; the difference leaves out what does not grow with their number
LANES = os.cpu_count() or 1

Run = Callable[[int], None]  # run so many tasks, and return when all have ended


def difference(run: Run, short: int = SHORT, long: int = LONG) -> dict[str, float]:
    """Seconds per task, as (t(long) - t(short)) / (long - short); ``cpu``: of the processor, for whoever has ended."""

    def seconds(count: int) -> tuple[float, float]:
        begun, used = time.perf_counter(), _processor()
        run(count)
        return time.perf_counter() - begun, _processor() - used

    seconds(3)
    (first, few), (second, many) = seconds(short), seconds(long)
    tasks = long - short
    return {"short": first, "long": second, "per_step": (second - first) / tasks, "cpu": (many - few) / tasks}


def _processor() -> float:
    """Processor seconds of this process, and of all that ended below it and was waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def nothing(*_: object) -> None:
    """The task."""
    return


# --- without anybody --------------------------------------------------------------------------------------------------


def _forked() -> tuple[int, int]:
    """A child that sends a byte through a pipe and ends: its process id, and the pipe's end to read from."""
    end, start = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(start, b"done")
        os._exit(0)
    os.close(start)
    return pid, end


def _reap(pid: int, end: int) -> None:
    os.read(end, 16)
    os.close(end)
    os.waitpid(pid, 0)


@contextlib.contextmanager
def fork(shape: str, folder: str) -> Iterator[Run]:
    """Bare fork + pipe + wait: the least that a process for each task can cost. A fan-out keeps a child per core."""
    import select

    def chain(count: int) -> None:
        for _ in range(count):
            _reap(*_forked())

    def fanout(count: int) -> None:
        poll, running, left = select.poll(), {}, count
        while left or running:
            while left and len(running) < LANES:
                pid, end = _forked()
                running[end] = pid
                poll.register(end, select.POLLIN)
                left -= 1
            for end, _ in poll.poll():
                poll.unregister(end)
                _reap(running.pop(end), end)

    yield chain if shape == "chain" else fanout


# --- those that use their processes again -----------------------------------------------------------------------------


def _of_futures(submit: Callable[..., Any], shape: str) -> Run:
    """For executors in the manner of ``concurrent.futures``: what needs another is submitted when that has ended."""

    def chain(count: int) -> None:
        for _ in range(count):
            submit(nothing).result()

    def fanout(count: int) -> None:
        for future in [submit(nothing) for _ in range(count)]:
            future.result()

    return chain if shape == "chain" else fanout


@contextlib.contextmanager
def pool(shape: str, folder: str) -> Iterator[Run]:
    """``concurrent.futures.ProcessPoolExecutor``."""
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1 if shape == "chain" else LANES) as executor:
        yield _of_futures(executor.submit, shape)


@contextlib.contextmanager
def loky(shape: str, folder: str) -> Iterator[Run]:
    """loky's reusable executor."""
    from loky import get_reusable_executor  # type: ignore[import-not-found]

    executor = get_reusable_executor(max_workers=1 if shape == "chain" else LANES)
    yield _of_futures(executor.submit, shape)
    executor.shutdown(wait=True)


@contextlib.contextmanager
def dask(shape: str, folder: str) -> Iterator[Run]:
    """Dask's distributed scheduler with worker processes."""
    from distributed import Client, LocalCluster  # type: ignore[import-not-found]

    def chain(count: int) -> None:
        future = client.submit(nothing, pure=False)
        for _ in range(count - 1):
            future = client.submit(nothing, future, pure=False)
        future.result()

    def fanout(count: int) -> None:
        client.gather(client.map(nothing, range(count), pure=False))

    settings = {"processes": True, "dashboard_address": None, "local_directory": folder}
    with LocalCluster(n_workers=LANES, threads_per_worker=1, **settings) as cluster, Client(cluster) as client:
        yield chain if shape == "chain" else fanout


@contextlib.contextmanager
def parsl(shape: str, folder: str) -> Iterator[Run]:
    """Parsl's HighThroughputExecutor."""
    import parsl as module  # type: ignore[import-not-found]
    from parsl.config import Config  # type: ignore[import-not-found]
    from parsl.executors import HighThroughputExecutor  # type: ignore[import-not-found]
    from parsl.providers import LocalProvider  # type: ignore[import-not-found]

    app = module.python_app(nothing)

    def chain(count: int) -> None:
        future = app()
        for _ in range(count - 1):
            future = app(future)
        future.result()

    def fanout(count: int) -> None:
        for future in [app() for _ in range(count)]:
            future.result()

    executor = HighThroughputExecutor(
        label="htex",
        address="127.0.0.1",
        max_workers_per_node=LANES,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )
    with module.load(Config(executors=[executor], run_dir=folder, strategy="none", initialize_logging=False)):
        yield chain if shape == "chain" else fanout


@contextlib.contextmanager
def ray(shape: str, folder: str) -> Iterator[Run]:
    """Ray on this machine."""
    import ray as module  # type: ignore[import-not-found]

    task = module.remote(num_cpus=1)(nothing)

    def chain(count: int) -> None:
        reference = task.remote()
        for _ in range(count - 1):
            reference = task.remote(reference)
        module.get(reference)

    def fanout(count: int) -> None:
        module.get([task.remote() for _ in range(count)])

    with tempfile.TemporaryDirectory(prefix="ray-") as short:  # its sockets' paths may have 107 characters
        module.init(num_cpus=LANES, include_dashboard=False, logging_level="ERROR", _temp_dir=short)
        yield chain if shape == "chain" else fanout
        module.shutdown()


# --- netunicorn -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def netunicorn(shape: str, folder: str) -> Iterator[Run]:
    """netunicorn's executor with a pipeline, without a gateway and without a heartbeat."""
    from netunicorn.base.pipeline import Pipeline  # type: ignore[import-not-found]
    from netunicorn.base.task import Task  # type: ignore[import-not-found]
    from netunicorn.executor.executor import Executor  # type: ignore[import-not-found]

    class Nothing(Task):  # type: ignore[misc]
        def run(self) -> None:
            return None

    def run(count: int) -> None:
        tasks = [Nothing() for _ in range(count)]
        executor = Executor("bench", gateway_endpoint="http://127.0.0.1:9", heartbeat=False)
        executor.execution_graph = Pipeline(tasks if shape == "chain" else [tasks], report_results=False)
        executor()
        if sum(map(len, executor.step_results.values())) != count:
            raise SystemExit(f"not all of {count} tasks ran")

    os.chdir(folder)
    yield run


def netunicorn_idle(folder: str) -> None:
    """Hold an executor of theirs with one task that sleeps; print its process. Its end is to be killed."""
    from netunicorn.base.pipeline import Pipeline
    from netunicorn.base.task import Task
    from netunicorn.executor.executor import Executor

    class Asleep(Task):  # type: ignore[misc]
        def run(self) -> None:
            time.sleep(3600)

    os.chdir(folder)
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    executor = Executor("bench", gateway_endpoint="http://127.0.0.1:9", heartbeat=False)
    executor.execution_graph = Pipeline([Asleep()], report_results=False)
    executor()


PEERS = {one.__name__: one for one in (fork, pool, loky, dask, parsl, ray, netunicorn)}
# Of netunicorn's, which looks once a second whether a task has ended, so many as are done in a few seconds.
COUNTS = {("netunicorn", "chain"): (1, 4), ("netunicorn", "fanout"): (20, 220)}


def main(peer: str, shape: str, folder: str) -> dict[str, float]:
    """Measure one peer."""
    with PEERS[peer](shape, folder) as run:
        return difference(run, *COUNTS.get((peer, shape), (SHORT, LONG)))


if __name__ == "__main__":
    if sys.argv[1:3] == ["netunicorn", "idle"]:
        netunicorn_idle(sys.argv[3])
    else:
        print(json.dumps(main(*sys.argv[1:4])))
