"""What the executor costs on a node: from the start of ``fieldlab.pyz`` to a first result, and what it holds in memory."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fieldlab as fl
from fieldlab import here, local, ship
from fieldlab_common.protocol import Lane
from fieldlab_executor import zipapp
from figures import CACHE, Figure, call, in_turns
from tasks import nothing

BASE = "python -c 'import ssl, http.client, dataclasses'"


def measure(rounds: int) -> list[Figure]:
    """Times in ms, memory in MiB."""
    pyz = zipapp.build(CACHE / "fieldlab.pyz")
    warm = tempfile.mkdtemp(dir=CACHE)
    _first_result(pyz, warm)
    times = in_turns(
        rounds * 3,
        {
            BASE: _base,
            "fieldlab.pyz: start to first result, warm": lambda: _first_result(pyz, warm),
            "fieldlab.pyz: start to first result, cold": lambda: _first_result(pyz, tempfile.mkdtemp(dir=CACHE)),
        },
    )
    figures = [
        Figure(
            name=name,
            unit="ms",
            samples=samples,
            against="" if name == BASE else BASE,
            aim=4.0 if "warm" in name else None,
        )
        for name, samples in times.items()
    ]
    memory = [_memory(pyz, warm) for _ in range(rounds)]
    names = (
        "supervisor: resident memory",
        "executor with 1 step: resident memory",
        "executor with 1 step: proportional share",
    )
    for index, name in enumerate(names):
        figures.append(
            Figure(name=name, unit="MiB", samples=tuple(one[index] for one in memory), aim=None if index else 30.0)
        )
    size = os.path.getsize(pyz) / 1e6
    return [*figures, Figure(name="fieldlab.pyz", unit="MB", samples=(size,))]


def _base() -> float:
    start = time.perf_counter()
    call([sys.executable, "-c", "import ssl, http.client, dataclasses"])
    return (time.perf_counter() - start) * 1000


@contextmanager
def _executor(dag: fl.DAG, pyz: Path | str, cache: str) -> Iterator[Callable[[], fl.Run]]:
    """A run of ``dag`` whose executor is the file; calling what is given starts it."""
    shipment = ship.require_sound(ship.pack(fl.Experiment(dag.name).map(dag, here.this_node())))
    before, local._EXECUTOR = local._EXECUTOR, (sys.executable, str(pyz))
    os.environ["FIELDLAB_CACHE"] = cache
    source = local.LocalSource(shipment)

    def start() -> fl.Run:
        source.launch()
        return fl.Run(source, source.info())

    try:
        yield start
    finally:
        source.close()
        local._EXECUTOR = before
        del os.environ["FIELDLAB_CACHE"]


def _first_result(pyz: Path | str, cache: str) -> float:
    with _executor(fl.Pipeline("first").then(nothing()), pyz, cache) as start:
        begin = time.perf_counter()
        run = start()
        while run.refresh(5.0)["localhost"]["nothing"].status is not fl.StepState.SUCCEEDED:
            assert not run.state.terminal
        return (time.perf_counter() - begin) * 1000


def _memory(pyz: Path | str, cache: str) -> tuple[float, float, float]:
    """Resident memory of the supervisor, of it and all below it, and their proportional share, in MiB."""
    with _executor(fl.Pipeline("held").then(fl.wait_for("go").named("held")), pyz, cache) as start:
        run = start()
        while run.refresh(5.0)["localhost"]["held"].status is not fl.StepState.RUNNING:
            assert not run.state.terminal
        records = run._source.records(Lane.CONTROL, 0, 0.0).records
        pid = next(entry.record.body["pid"] for entry in records if entry.record.kind == "started")
        tree = [pid, *_below(pid)]
        found = _kib(pid, "Rss"), sum(_kib(one, "Rss") for one in tree), sum(_kib(one, "Pss") for one in tree)
        run.events.send("go")
        run.wait(30)
        return found[0] / 1024, found[1] / 1024, found[2] / 1024


def _below(pid: int) -> list[int]:
    children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [one for child in children for one in (child, *_below(child))]


def _kib(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))
