"""The Pythons of a node: which versions there are, and where.

A session that a program opens has a shorter PATH than its user's, so versions are looked for where their managers keep
them too: uv's folder and pyenv's. What is found must run, and be CPython: code that travels by value is of one minor
version of it. A manager's shim that is on PATH and answers for no version is passed over like one that is not there.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from fieldlab_common.errors import UnsupportedError

__all__ = ["find_python", "interpreters", "own_version"]

MINORS = range(11, 20)
PROBE_SECONDS = 20.0
_USUAL = ("/usr/local/bin", "/usr/bin", "/opt/homebrew/bin")
_PROBE = "import sys; print('%s %d.%d' % (sys.implementation.name, *sys.version_info[:2]))"


def own_version() -> str:
    """The version that this runs on, like ``3.11``."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def find_python(version: str) -> str:
    """The interpreter of that version (``3.12``), or this one if it is empty.

    Raises:
        UnsupportedError: the node has none.
    """
    if not version or version == own_version():
        return sys.executable
    found = _find(version)
    if found is None:
        raise UnsupportedError(
            f"The node has no Python {version}, which the environment needs.",
            advice=f"Install it on the node (`uv python install {version}`, or the system's package python{version});"
            f" or submit from one of the versions that the node has ({', '.join(interpreters())});"
            " or put the tasks into a module, which needs no particular version.",
        )
    return found


def interpreters() -> list[str]:
    """The versions of Python on the node that work, the executor's own first."""
    others = (f"3.{minor}" for minor in MINORS)
    return [own_version(), *(other for other in others if other != own_version() and _find(other))]


def _find(version: str) -> str | None:
    candidates = dict.fromkeys(path for path in _candidates(version, os.environ) if os.access(path, os.X_OK))
    return next((path for path in candidates if _works(path, version)), None)


def _candidates(version: str, environ: Mapping[str, str]) -> Iterator[str]:
    """Where an interpreter of that version may be, in the order in which they are preferred."""
    name = f"python{version}"
    for place in (*os.get_exec_path(), *_USUAL):
        yield os.path.join(place, name)
    home = Path.home()
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    managed = (
        (Path(environ.get("UV_PYTHON_INSTALL_DIR") or data / "uv" / "python"), f"cpython-{version}.*"),
        (Path(environ.get("PYENV_ROOT") or home / ".pyenv") / "versions", f"{version}.*"),
    )
    for folder, pattern in managed:
        for found in sorted(folder.glob(pattern), key=_numbers, reverse=True):
            yield str(found / "bin" / name)


def _numbers(path: Path) -> list[int]:
    """For sorting by version: 3.12.10 is after 3.12.9."""
    return [int(digits) for digits in re.findall(r"\d+", path.name)]


def _works(path: str, version: str) -> bool:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(
            [path, "-S", "-E", "-c", _PROBE], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        return run.returncode == 0 and run.stdout.split() == ["cpython", version]
    return False
