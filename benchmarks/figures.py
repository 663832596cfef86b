"""The client and the executor: how soon each is there, and how much it takes. And the table of all groups."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bulk
import crowd
import executor
import hops
import idle
import ingest
import scale
import steps
import warm
from fieldlab_executor import zipapp
from measure import (
    Row,
    Unavailable,
    Versions,
    alternate,
    client_environment,
    installed,
    peer_environment,
    program,
    run,
    work,
)

NETUNICORN = "netunicorn-client"

# --- the client -------------------------------------------------------------------------------------------------------

_IMPORT = "from time import perf_counter as now; begun = now(); import {}; print(now() - begun)"


def client(rounds: int, versions: Versions) -> list[Row]:
    """How long the import takes, in fresh interpreters, and what is installed for it."""
    ours, theirs, note = client_environment(), None, ""
    versions["fieldlab"] = installed(ours)
    try:
        theirs = peer_environment(NETUNICORN, versions)
    except Unavailable as error:
        note = str(error)

    def of_both(measure: Callable[[Path], float]) -> dict[str, list[float]]:
        return {"samples": [measure(ours)], "peer_samples": [measure(theirs)] if theirs else []}

    both: dict[str, Callable[[], float]] = {"samples": lambda: _import(ours, "fieldlab")}
    if theirs:
        both["peer_samples"] = lambda: _import(theirs, "netunicorn.client")
    alternate(1, both)  # brings the files into memory
    peer: dict[str, Any] = {"peer": NETUNICORN, "note": note}
    return [
        Row(name="import fieldlab", unit="ms", aim=0.25, aimed="ratio", **alternate(rounds, both), **peer),
        Row(name="installed size", unit="MB", aim=6, **of_both(_size), **peer),
        Row(name="distributions", unit="", aim=11, **of_both(lambda python: len(installed(python))), **peer),
    ]


def _import(python: Path, module: str) -> float:
    return 1000 * float(run([python, "-c", _IMPORT.format(module)]))


def _size(python: Path) -> float:
    """Megabytes (10**6) of what is installed, bytecode included, as pip leaves it."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = Path(run([python, "-I", "-c", code]).strip())
    return (
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.startswith("_virtualenv")) / 1e6
    )


# --- the executor -----------------------------------------------------------------------------------------------------


def node(rounds: int, versions: Versions) -> list[Row]:
    """How soon an executor gives its first result, and what it holds while it has nothing to do."""
    folder = work("executor")
    pyz, warm = zipapp.build(folder / "fieldlab.pyz"), folder / "warm"
    versions["fieldlab.pyz"] = f"{pyz.stat().st_size} bytes"
    places = (folder / str(number) for number in itertools.count())
    executor.first_result(pyz, next(places), warm)
    times = alternate(
        rounds,
        {
            "warm": lambda: 1000 * executor.first_result(pyz, next(places), warm),
            "bare": lambda: 1000 * executor.bare_python(),
            "cold": lambda: 1000 * executor.first_result(pyz, next(places), next(places)),
            "local": lambda: 1000 * program("one-step", str(next(places)))["seconds"],
        },
    )
    sizes = alternate(
        min(rounds, 3),
        {
            "http": lambda: executor.idle_memory(pyz, next(places), warm),
            "pipe": lambda: program("idle-memory", str(next(places))),
        },
    )
    shutil.rmtree(folder)
    bare: dict[str, Any] = {"unit": "ms", "peer": "python3 -c 'import ssl, …'", "peer_samples": times["bare"]}
    return [
        Row(name="first result, warm cache", samples=times["warm"], aim=4, aimed="ratio", **bare),
        Row(name="first result, cold cache", samples=times["cold"], **bare),
        Row(name="fl.run of one step, whole call", samples=times["local"], **bare),
        *_memory(sizes["http"], "over HTTP"),
        *_memory(sizes["pipe"], "over the pipe"),
    ]


def _memory(found: list[dict[str, int]], how: str) -> list[Row]:
    def of(name: str) -> dict[str, Any]:
        return {"unit": "MB", "samples": [one[name] / 1e6 for one in found]}

    count = f"{found[0]['processes']} processes: supervisor, spawner, the step, and the children that wait for a job"
    return [
        Row(name=f"supervisor, {how} (RSS)", aim=30, **of("supervisor")),
        Row(name=f"its tree, {how} (RSS)", note=count, **of("tree")),
        Row(name=f"its tree, {how} (PSS)", note=count, **of("tree_pss")),
    ]


FIGURES: dict[str, Callable[[int, Versions], list[Row]]] = {
    "client": client,
    "chain": steps.chain,
    "fanout": steps.fanout,
    "growth": scale.growth,
    "plan": scale.plan,
    "simulation": scale.simulation,
    "executor": node,
    "idle": idle.idle,
    "ingest": ingest.ingest,
    "events": hops.events,
    "artifacts": bulk.artifacts,
    "fleet": crowd.fleet,
    "submit": warm.submit,
    "restart": crowd.restart,
}
