"""What a step costs: a chain of steps that do nothing, each in a process of its own, beside the bare system calls.

Per step is (t(1100) - t(100)) / 1000, so that starting and ending are left out.
"""

from __future__ import annotations

import sys
import tempfile
import time

import fieldlab as fl
from figures import Figure, call, in_turns
from installs import netunicorn_executor
from tasks import nothing

SHORT, LONG = 100, 1100

BARE = """
import os, time
def one():
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write, b"x")
        os._exit(0)
    os.close(write)
    while os.read(read, 64):
        pass
    os.close(read)
    os.waitpid(pid, 0)
for _ in range(100):
    one()
start = time.perf_counter()
for _ in range(1000):
    one()
print(time.perf_counter() - start)
"""

POOL = """
import time
from concurrent.futures import ProcessPoolExecutor
def one(value):
    return value
with ProcessPoolExecutor(1) as pool:
    for _ in range(100):
        pool.submit(one, None).result()
    start = time.perf_counter()
    for _ in range(1000):
        pool.submit(one, None).result()
    print(time.perf_counter() - start)
"""

NETUNICORN = """
import asyncio, logging, time
from netunicorn.base.pipeline import Pipeline
from netunicorn.base.task import Task
from netunicorn.base.types import ExecutorState
from netunicorn.executor.executor import Executor
logging.disable()
class Nothing(Task):
    def run(self):
        return None
if __name__ == "__main__":
    executor = Executor("bench", "http://127.0.0.1:1", "bench", heartbeat=False)
    executor.execution_graph = Pipeline([Nothing() for _ in range(3)])
    executor.state = ExecutorState.EXECUTING
    start = time.perf_counter()
    asyncio.run(executor.execute())
    took = time.perf_counter() - start
    assert sum(map(len, executor.step_results.values())) == 3
    print(took / 3)
"""


def measure(rounds: int) -> list[Figure]:
    """Milliseconds for a step."""
    unit, bare = "ms", "a bare fork, pipe and wait"
    found = in_turns(
        rounds, {bare: _script(BARE), "a step of fl.run": _step, "a call of ProcessPoolExecutor": _script(POOL)}
    )
    other = in_turns(rounds, {"a task of netunicorn's executor": _netunicorn})
    return [
        Figure(name=bare, unit=unit, samples=found[bare]),
        Figure(name="a step of fl.run", unit=unit, samples=found["a step of fl.run"], against=bare, aim=1.5),
        *(
            Figure(name=name, unit=unit, samples=({**found, **other})[name], against=bare)
            for name in ("a call of ProcessPoolExecutor", "a task of netunicorn's executor")
        ),
    ]


def _step() -> float:
    return _chain(LONG) - _chain(SHORT)


def _chain(length: int) -> float:
    with fl.DAG("chain") as dag:
        before = nothing()
        for _ in range(length - 1):
            before = nothing().after(before)
    start = time.perf_counter()
    results = fl.run(dag)
    took = time.perf_counter() - start
    assert results.state is fl.DeploymentState.SUCCEEDED
    return took


def _script(code: str):  # type: ignore[no-untyped-def]
    """Seconds for a thousand, which is ms for one; in an interpreter that has nothing else in it."""
    return lambda: float(call([sys.executable, "-I", "-c", code]))


def _netunicorn() -> float:
    with tempfile.TemporaryDirectory() as folder:
        script = f"{folder}/chain.py"
        with open(script, "w", encoding="utf-8") as file:
            file.write(NETUNICORN)
        return float(call([netunicorn_executor() / "bin" / "python", script], cwd=folder)) * 1000
