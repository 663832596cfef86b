"""What installing and importing the client costs, beside netunicorn-client; each in an empty venv of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from figures import CACHE, ROOT, UV, Figure, call, in_turns

WHEELS = CACHE / "wheels"
USED = "import fieldlab as fl; fl.task, fl.DAG, fl.Experiment, fl.Client, fl.run, fl.plan, fl.node"


def measure(rounds: int) -> list[Figure]:
    """Import times, sizes, numbers of distributions."""
    ours, theirs = _ours(), netunicorn()
    times = in_turns(
        rounds * 3,
        {
            "import netunicorn.client": _import(theirs, "import netunicorn.client"),
            "import fieldlab": _import(ours, "import fieldlab"),
            "import fieldlab, and all that a program uses": _import(ours, USED),
        },
    )
    against = "import netunicorn.client"
    figures = [
        Figure(
            name=name,
            unit="ms",
            samples=samples,
            against=against if "field" in name else "",
            aim=0.25 if "field" in name else None,
        )
        for name, samples in times.items()
    ]
    for name, folder in (("netunicorn-client", theirs), ("fieldlab", ours)):
        aims = (6.0, 11.0) if name == "fieldlab" else (None, None)
        size, count = _size(folder), float(len(list(_site(folder).glob("*.dist-info"))))
        figures.append(Figure(name=f"size of {name}, installed", unit="MB", samples=(size,), aim=aims[0]))
        figures.append(Figure(name=f"distributions of {name}", unit="", samples=(count,), aim=aims[1]))
    return figures


def _ours() -> Path:
    call([UV, "build", "--quiet", "--all-packages", "--wheel", "--out-dir", WHEELS, "--clear"], cwd=ROOT)
    wheels = [next(WHEELS.glob(f"{name}-*.whl")) for name in ("fieldlab", "fieldlab_common", "fieldlab_executor")]
    return _venv("fieldlab", [str(wheel) for wheel in wheels], renew=True)


def netunicorn() -> Path:
    """A venv with netunicorn-client as it is published."""
    return _venv("netunicorn-client", ["netunicorn-client"])


def netunicorn_executor() -> Path:
    """A venv with netunicorn's executor too."""
    return _venv("netunicorn-executor", ["netunicorn-client", "netunicorn-executor"])


def _venv(name: str, packages: list[str], *, renew: bool = False) -> Path:
    folder = CACHE / name
    if renew or not (folder / "made").exists():
        call([UV, "venv", "--quiet", "--clear", "--python", ROOT / ".venv" / "bin" / "python", folder])
        call([UV, "pip", "install", "--quiet", "--python", folder / "bin" / "python", *packages])
        (folder / "made").touch()
    return folder


def _import(folder: Path, statement: str) -> Callable[[], float]:
    """What the statement adds to the start of an interpreter, in ms; bytecode is there already."""
    python = folder / "bin" / "python"

    def started(code: str) -> float:
        begin = time.perf_counter()
        call([python, "-c", code])
        return (time.perf_counter() - begin) * 1000

    started(statement)
    return lambda: max(0.01, started(statement) - started("pass"))


def _site(folder: Path) -> Path:
    return next((folder / "lib").glob("python*")) / "site-packages"


def _size(folder: Path) -> float:
    """MB of files, without the bytecode that depends on what was imported, and without what a venv itself brings."""
    files = (path for path in _site(folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return sum(path.stat().st_size for path in files if not path.name.startswith("_virtualenv")) / 1e6
