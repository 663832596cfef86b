"""What is measured: each figure beside its peer, in rounds that alternate, so that a busy machine is busy for both.

A ratio is the median of the rounds' own ratios, not the ratio of the medians, for the same reason. A peer that cannot be
had (no index, no wheel) leaves its column empty, with the reason as the row's note; the rest goes on.
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
    variables |= {"UV_CACHE_DIR": str(ROOT / ".cache" / "uv"), "UV_SYSTEM_CERTS": "1", "UV_PYTHON_DOWNLOADS": "never"}
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


def imports(rounds: int, versions: dict[str, Any]) -> list[Row]:
    """How long the import takes, in fresh interpreters, and what is installed for it."""
    ours = client_environment()
    versions["client"] = installed(ours)
    note, theirs = "", None
    try:
        theirs = peer_environment("client")
        versions["netunicorn-client"] = installed(theirs)
    except Unavailable as error:
        note = str(error)
    sides = [(ours, "fieldlab", [])] + ([(theirs, "netunicorn.client", [])] if theirs else [])
    for number in range(rounds + 1):  # the first brings the files into memory
        for python, module, samples in sides:
            taken = 1000 * float(run([python, "-c", _IMPORT.format(module)]))
            samples += [taken] if number else []
    (mine, their) = (sides[0][2], sides[1][2] if theirs else [])
    peer = PEER["client"]
    sizes, counts = ([_size(one)] for one in [ours]), ([float(len(installed(one)))] for one in [ours])
    their_size, their_count = ([_size(theirs)], [float(len(installed(theirs)))]) if theirs else ([], [])
    return [
        Row(
            name="import fieldlab",
            unit="ms",
            samples=mine,
            peer="import netunicorn.client",
            peer_samples=their,
            aim=0.25,
            aimed="ratio",
            note=note,
        ),
        Row(
            name="installed size", unit="MB", samples=next(sizes), peer=peer, peer_samples=their_size, aim=6, note=note
        ),
        Row(
            name="distributions", unit="", samples=next(counts), peer=peer, peer_samples=their_count, aim=11, note=note
        ),
    ]
