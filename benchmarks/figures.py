"""What is measured: each figure beside its peer, in rounds that alternate, so that a busy machine is busy for both.

A ratio is the median of the rounds' own ratios, not the ratio of the medians, for the same reason. A peer that cannot
be had (no index, no wheel) leaves its column empty, with the reason as the row's note; the rest goes on.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import executor
from fieldlab_executor import zipapp

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
PROGRAMS = Path(__file__).with_name("programs.py")
LIMIT = 900.0  # seconds for one command
PEER = {"client": "netunicorn-client", "executor": "netunicorn-executor"}


class Unavailable(Exception):
    """Something to measure, or to compare with, cannot be had here; its text says why."""


@dataclass(kw_only=True)
class Row:
    """A line of the table. ``aim``: the most that ``aimed`` may be, which is the ratio or the figure itself."""

    name: str
    unit: str
    samples: list[float]
    peer: str = ""
    peer_samples: list[float] = field(default_factory=list)
    aim: float | None = None
    aimed: str = "figure"
    note: str = ""

    @property
    def figure(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def peer_figure(self) -> float | None:
        """The peer's median."""
        return statistics.median(self.peer_samples) if self.peer_samples else None

    @property
    def ratio(self) -> float | None:
        """Ours by the peer's: below 1, ours is less."""
        if not self.peer_samples:
            return None
        if len(self.peer_samples) != len(self.samples):
            return self.figure / statistics.median(self.peer_samples)
        return statistics.median(a / b for a, b in zip(self.samples, self.peer_samples, strict=True))

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None: there is none, or nothing to compare with."""
        value = self.ratio if self.aimed == "ratio" else self.figure
        return None if self.aim is None or value is None else value <= self.aim

    def data(self) -> dict[str, Any]:
        """Everything, for the JSON file."""
        derived = {name: getattr(self, name) for name in ("figure", "peer_figure", "ratio", "met")}
        return {**asdict(self), **derived}


# --- environments -----------------------------------------------------------------------------------------------------


def run(command: Sequence[str | Path], *, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """The standard output of a command.

    Raises:
        Unavailable: it failed; the text has its last line.
    """
    leaking = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    variables = {k: v for k, v in os.environ.items() if k not in leaking} | (env or {})
    variables |= {"UV_SYSTEM_CERTS": "1", "UV_PYTHON_DOWNLOADS": "never"}
    variables.setdefault("UV_CACHE_DIR", str(ROOT / ".cache" / "uv"))
    try:
        done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise Unavailable(f"{Path(command[0]).name} exited with {done.returncode}: {said[-1]}")
    return done.stdout


def client_environment() -> Path:
    """An empty environment with the client's wheels, as they are built now; its interpreter."""
    wheels = CACHE / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    run([_uv(), "build", "--quiet", "--all-packages", "--wheel", "--out-dir", wheels])
    names = ("fieldlab", "fieldlab_common", "fieldlab_executor")
    return _environment("client", [str(next(wheels.glob(f"{name}-[0-9]*.whl"))) for name in names], fresh=True)


def peer_environment(part: str) -> Path:
    """An environment with a distribution of netunicorn's, made on first use; its interpreter."""
    return _environment(PEER[part], [PEER[part]], fresh=False)


def _environment(name: str, requirements: list[str], *, fresh: bool) -> Path:
    folder = CACHE / name
    python, stamp = folder / "bin" / "python", folder / "made-for"
    wanted = json.dumps([sys.version, requirements])
    if not fresh and stamp.is_file() and stamp.read_text() == wanted:
        return python
    run([_uv(), "venv", "--quiet", "--clear", "--python", sys.executable, folder])
    run([_uv(), "pip", "install", "--quiet", "--compile-bytecode", "--python", python, *requirements])
    stamp.write_text(wanted)
    return python


def _uv() -> Path:
    return ROOT / ".uv" / "bin" / "uv"


def installed(python: Path) -> dict[str, str]:
    """The distributions of an environment, with their versions."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found: dict[str, str] = json.loads(run([python, "-I", "-c", code]))
    return dict(sorted(found.items()))


def _size(python: Path) -> float:
    """Megabytes (10**6) of what is installed, bytecode included, as pip leaves it."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = Path(run([python, "-I", "-c", code]).strip())
    return (
        sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.name.startswith("_virtualenv")) / 1e6
    )


# --- the client -------------------------------------------------------------------------------------------------------

_IMPORT = "from time import perf_counter as now; begun = now(); import {}; print(now() - begun)"


def client(rounds: int, versions: dict[str, Any]) -> list[Row]:
    """How long the import takes, in fresh interpreters, and what is installed for it."""
    ours, theirs, note = client_environment(), None, ""
    versions["fieldlab"] = installed(ours)
    try:
        theirs = peer_environment("client")
        versions[PEER["client"]] = installed(theirs)
    except Unavailable as error:
        note = str(error)

    def of_both(measure: Callable[[Path], float]) -> dict[str, list[float]]:
        return {"samples": [measure(ours)], "peer_samples": [measure(theirs)] if theirs else []}

    both: dict[str, Callable[[], float]] = {"samples": lambda: _import(ours, "fieldlab")}
    if theirs:
        both["peer_samples"] = lambda: _import(theirs, "netunicorn.client")
    alternate(1, both)  # brings the files into memory
    peer: dict[str, Any] = {"peer": PEER["client"], "note": note}
    return [
        Row(name="import fieldlab", unit="ms", aim=0.25, aimed="ratio", **alternate(rounds, both), **peer),
        Row(name="installed size", unit="MB", aim=6, **of_both(_size), **peer),
        Row(name="distributions", unit="", aim=11, **of_both(lambda python: len(installed(python))), **peer),
    ]


def _import(python: Path, module: str) -> float:
    return 1000 * float(run([python, "-c", _IMPORT.format(module)]))


def alternate(rounds: int, measures: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """The samples of each measure, taken in turn."""
    found: dict[str, Any] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


# --- the chain --------------------------------------------------------------------------------------------------------


def chain(rounds: int, versions: dict[str, Any]) -> list[Row]:
    """What a step costs in a chain of steps that do nothing."""
    folder = _work("chain")
    places = (str(folder / str(number)) for number in itertools.count())
    found = alternate(
        rounds,
        {
            "fieldlab": lambda: _per_step("chain-fieldlab", next(places)),
            "fork": lambda: _per_step("chain-fork"),
            "pool": lambda: _per_step("chain-pool"),
        },
    )
    theirs, note = [], ""
    try:
        python = peer_environment("executor")
        versions[PEER["executor"]] = installed(python)
        theirs = [_per_step("chain-netunicorn", "3", python=python, cwd=folder) for _ in range(min(rounds, 3))]
    except Unavailable as error:
        note = str(error)
    shutil.rmtree(folder)
    ours: dict[str, Any] = {"name": "a step of a chain", "unit": "ms", "samples": found["fieldlab"]}
    return [
        Row(peer="fork + pipe + wait", peer_samples=found["fork"], aim=1.5, aimed="ratio", **ours),
        Row(peer="ProcessPoolExecutor (no process of its own)", peer_samples=found["pool"], **ours),
        Row(peer="netunicorn's executor, chain of 3", peer_samples=theirs, note=note, **ours),
    ]


def _per_step(program: str, *arguments: str, python: Path = Path(sys.executable), cwd: Path = ROOT) -> float:
    found: dict[str, float] = _program(program, *arguments, python=python, cwd=cwd)
    return 1000 * found["per_step"]


def _program(name: str, *arguments: str, python: Path = Path(sys.executable), cwd: Path = ROOT) -> Any:
    return json.loads(run([python, PROGRAMS, name, *arguments], cwd=cwd, env={"FIELDLAB_CACHE": str(CACHE / "cache")}))


def _work(name: str) -> Path:
    """A fresh folder below the checkout: on a real file system, where /tmp may be memory."""
    folder = CACHE / "work" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# --- the executor -----------------------------------------------------------------------------------------------------


def node(rounds: int, versions: dict[str, Any]) -> list[Row]:
    """How soon an executor gives its first result, and what it holds while it has nothing to do."""
    folder = _work("executor")
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
            "local": lambda: 1000 * _program("one-step", str(next(places)))["seconds"],
        },
    )
    sizes = alternate(
        min(rounds, 3),
        {
            "http": lambda: executor.idle_memory(pyz, next(places), warm),
            "pipe": lambda: _program("idle", str(next(places))),
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


FIGURES: dict[str, Callable[[int, dict[str, Any]], list[Row]]] = {"client": client, "chain": chain, "executor": node}
