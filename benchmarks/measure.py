"""How it is measured: each figure beside its peer, in rounds that alternate, so that a busy machine is busy for both.

A ratio is the median of the rounds' own ratios, not the ratio of the medians, for the same reason. A peer that cannot
be had (no index, no wheel), or fails, leaves its column empty, with the reason as the row's note; the rest goes on.
Every program that is timed runs in a process of its own: a parent's size is part of what a fork costs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
PROGRAMS, PEERS = (Path(__file__).with_name(name) for name in ("programs.py", "peers.py"))
LIMIT = 900.0  # seconds for one command
Versions = dict[str, Any]


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
    def figure(self) -> float | None:
        """The median; None if it could not be measured."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def peer_figure(self) -> float | None:
        """The peer's median."""
        return statistics.median(self.peer_samples) if self.peer_samples else None

    @property
    def ratio(self) -> float | None:
        """Ours by the peer's: below 1, ours is less."""
        if not self.peer_samples or not self.samples:
            return None
        if len(self.peer_samples) != len(self.samples):
            return statistics.median(self.samples) / statistics.median(self.peer_samples)
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


def peer_environment(distribution: str, versions: Versions) -> Path:
    """An environment with a peer's distribution, made on first use; its interpreter."""
    python = _environment(distribution, [distribution], fresh=False)
    versions[distribution] = installed(python)
    return python


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


# --- taking samples ---------------------------------------------------------------------------------------------------


def alternate(rounds: int, measures: Mapping[str, Callable[[], float]]) -> dict[str, Any]:
    """The samples of each measure, taken in turn."""
    found: dict[str, Any] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
    return found


@dataclass
class Turns:
    """The samples of measures that were taken in turn, and why some could not be: those have none."""

    samples: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)

    @classmethod
    def take(cls, rounds: Mapping[str, int], measures: Mapping[str, Callable[[], float]]) -> Turns:
        """Take them; ``rounds`` says how often each."""
        turns = cls({name: [] for name in measures})
        for number in range(max(rounds.values())):
            for name, measure in measures.items():
                if number < rounds[name] and name not in turns.failed:
                    turns._take(name, measure)
        return turns

    def _take(self, name: str, measure: Callable[[], float]) -> None:
        try:
            self.samples[name].append(measure())
        except Unavailable as error:
            self.failed[name], self.samples[name] = str(error), []

    def note(self, *names: str) -> str:
        """Why those are missing, if they are."""
        return "; ".join(self.failed[name] for name in names if name in self.failed)


def per_step(found: Mapping[str, float]) -> float:
    """Milliseconds per step of what ``peers.difference`` found."""
    return 1000 * found["per_step"]


def processor(found: Mapping[str, float]) -> float:
    """Milliseconds of the processor per step of what ``peers.difference`` found."""
    return 1000 * found["cpu"]


def program(name: str, *arguments: str) -> Any:
    """What one of ``programs.py`` prints, on this interpreter."""
    return json.loads(run([sys.executable, PROGRAMS, name, *arguments], env=ours()))


def peer(name: str, shape: str, folder: Path, python: Path) -> Any:
    """What one of ``peers.py`` prints, on the interpreter of its own environment."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # Parsl starts what its environment has on PATH
    said = run([python, PEERS, name, shape, str(place)], env={"PATH": path, "RAY_USAGE_STATS_ENABLED": "0"})
    return json.loads(said.strip().splitlines()[-1])


def ours() -> dict[str, str]:
    """Variables for programs that use fieldlab."""
    return {"FIELDLAB_CACHE": str(CACHE / "cache")}


def work(name: str) -> Path:
    """A fresh folder below the checkout: on a real file system, where /tmp may be memory."""
    folder = CACHE / "work" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def version() -> str:
    """The Python version of this program, as nodes say theirs."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"
