"""Makes the environment of a deployment, or finds it made: gives the interpreter on which its steps run.

``Host`` is an interpreter of the node. A ``Venv`` is made once for what is asked of it: its folder is named by a digest
of the requirements, the interpreter and the platform; it is built beside its place and renamed into it under a lock, so
that a half-made one is never used and two executors never build the same one. Set-up commands and system packages
belong to it and run once, when it is made.

What builders say goes to ``log``, line by line. Requirements are the user's and may do what the user may do: commands
of ``setup`` go to a shell because that is what they are written for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from fieldlab_common.environment import Environment, Host, Requirements, Venv
from fieldlab_common.errors import FieldlabError, UnsupportedError

from fieldlab_executor.cache import cache_folder

__all__ = ["PrepareFailed", "ensure", "find_python", "interpreters"]

Log = Callable[[str], None]

MINORS = range(11, 20)
LAST_LINES = 20
BUILD_SECONDS = 3600.0
PROBE_SECONDS = 60.0
# Prints which of the named distributions an interpreter lacks.
_LACKING = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        version(name)
    except PackageNotFoundError:
        print(name)
"""


class PrepareFailed(FieldlabError):
    """The environment could not be made; the message has the last lines of what its builder said."""

    code: ClassVar[str] = "prepare_failed"


# --- interpreters ----------------------------------------------------------------------------------------------------


def _own_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _works(path: str, version: str) -> bool:
    """Whether ``path`` is a Python of that version; a shim of a version manager may be there and not work."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run([path, "-S", "-E", "-c", code], capture_output=True, text=True, timeout=20, check=False)
        return run.returncode == 0 and run.stdout.strip() == version
    return False


def find_python(version: str) -> str:
    """The interpreter of that version (``3.12``), or any if it is empty.

    Raises:
        UnsupportedError: the node has none.
    """
    if not version or version == _own_version():
        return sys.executable
    for folder in os.get_exec_path():
        path = os.path.join(folder, f"python{version}")
        if os.access(path, os.X_OK) and _works(path, version):
            return path
    raise UnsupportedError(
        f"The node has no Python {version}, in which the code of the tasks was written.",
        advice=f"Install Python {version} on the node, submit from one of the node's ({', '.join(interpreters())}),"
        " or put the tasks into a module that needs no particular version.",
    )


def interpreters() -> list[str]:
    """The versions of Python on the node that work, the executor's own first."""
    found = [_own_version()]
    for version in (f"3.{minor}" for minor in MINORS):
        if version not in found and any(
            os.access(path := os.path.join(folder, f"python{version}"), os.X_OK) and _works(path, version)
            for folder in os.get_exec_path()
        ):
            found.append(version)
    return found


# --- environments ----------------------------------------------------------------------------------------------------


def ensure(environment: Environment, *, python: str = "", cache: Path | None = None, log: Log = print) -> str:
    """Make the environment if it is not there; the path of its interpreter.

    ``python``: the version in which the tasks' code was written; any will do if it is empty.

    Raises:
        PrepareFailed: a builder failed, or needs what the node does not have.
        UnsupportedError: the node cannot have such an environment.
    """
    if isinstance(environment, Venv):
        return _venv(environment, environment.python or python, cache or cache_folder(), log)
    if not isinstance(environment, Host):
        raise UnsupportedError(
            f"This executor cannot make a {environment.kind!r} environment.",
            advice="Use a Venv or Host environment for this node.",
        )
    requirements = environment.requirements
    path = find_python(python)
    _check_packages(path, requirements.packages)
    _check_system_packages(requirements.system_packages, log, install=False)
    if requirements.setup:
        raise PrepareFailed("The tasks have setup commands, and Host runs none.", advice="Use env=fl.Venv().")
    return path


def _key(environment: Venv, python: str) -> str:
    requirements = environment.requirements
    content = {
        "python": os.path.realpath(python),
        "version": sys.version if python == sys.executable else "",
        "platform": sysconfig.get_platform(),
        "packages": requirements.packages,
        "system": requirements.system_packages,
        "setup": requirements.setup,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _venv(environment: Venv, version: str, cache: Path, log: Log) -> str:
    base = find_python(version)
    place = cache / "venvs" / _key(environment, base)
    python = place / "bin" / "python"
    if (place / ".complete").exists() and os.access(python, os.X_OK):
        return str(python)
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(place.with_suffix(".lock")):
        if not ((place / ".complete").exists() and os.access(python, os.X_OK)):
            shutil.rmtree(place, ignore_errors=True)
            try:
                _build(place, base, environment.requirements, log)
            except BaseException:
                shutil.rmtree(place, ignore_errors=True)
                raise
    return str(python)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _build(place: Path, base: str, requirements: Requirements, log: Log) -> None:
    """Make the venv in its place: scripts in it name their interpreter, so it stays; ``.complete`` is last."""
    _check_system_packages(requirements.system_packages, log, install=True)
    uv = shutil.which("uv")
    python = str(place / "bin" / "python")
    if uv:
        _run([uv, "venv", "--quiet", "--python", base, str(place)], "The virtual environment", log)
    else:
        making = [base, "-m", "venv", *([] if requirements.packages else ["--without-pip"]), str(place)]
        _run(making, "The virtual environment", log, advice="On Debian and Ubuntu it takes the package python3-venv.")
    if requirements.packages:
        pip = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
        if uv:
            pip = [uv, "pip", "install", "--python", python]
        _run([*pip, "--", *requirements.packages], f"Installing {', '.join(requirements.packages)}", log)
    variables = {"VIRTUAL_ENV": str(place), "PATH": f"{place / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}"}
    for command in requirements.setup:
        _run(["/bin/sh", "-c", command], f"The setup command {command!r}", log, env=variables)
    (place / ".complete").touch()


def _run(
    command: Sequence[str], what: str, log: Log, *, env: Mapping[str, str] | None = None, advice: str = ""
) -> None:
    """Run a builder; PrepareFailed with its last lines if it does not end well."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
        )
    except OSError as error:
        raise PrepareFailed(f"{what} failed: {command[0]} cannot be started: {error.strerror}.") from error
    with process:
        for line in process.stdout or ():
            last.append(line.rstrip())
            log(line.rstrip())
    if process.returncode != 0:
        said = "\n".join(last)
        raise PrepareFailed(
            f"{what} failed (exit code {process.returncode}). Its last words:\n{said}\n",
            advice=advice,
            details={"lines": list(last), "exit_code": process.returncode},
        )


# --- system packages -------------------------------------------------------------------------------------------------


def _check_packages(python: str, wanted: tuple[str, ...]) -> None:
    """See that the distributions are there, of whatever version: what a node has, its owner chose."""
    names = [
        match[0] for match in (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", package.strip()) for package in wanted) if match
    ]
    if not names:
        return
    done = subprocess.run(
        [python, "-c", _LACKING, *names], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
    )
    lacking = done.stdout.split() if not done.returncode else names
    if lacking:
        raise PrepareFailed(
            f"The node's {python} lacks {', '.join(lacking)}, and Host installs nothing.",
            advice="Use env=fl.Venv(), or install them on the node.",
        )


def _check_system_packages(wanted: Iterable[str], log: Log, *, install: bool) -> None:
    """See that the system packages are there; install them with apt-get where this process may."""
    missing = [name for name in wanted if not _is_installed(name)]
    if not missing:
        return
    names = " ".join(missing)
    apt = shutil.which("apt-get")
    if not install or apt is None or os.geteuid() != 0:
        why = "Host installs nothing" if not install else "this needs apt-get and root"
        raise PrepareFailed(
            f"The node lacks the system packages {names}, and {why}.",
            advice=f"Ask the node's owner for: apt-get install {names}",
        )
    variables = {"DEBIAN_FRONTEND": "noninteractive"}
    command = [apt, "install", "--yes", "--no-install-recommends", "--", *missing]
    try:
        _run(command, f"Installing {names}", log, env=variables)
    except PrepareFailed:  # a fresh node has no package lists, or old ones
        _run([apt, "update"], "Reading the package lists", log, env=variables)
        _run(command, f"Installing {names}", log, env=variables)


def _is_installed(name: str) -> bool:
    """Whether the package, or a program of that name, is there."""
    if shutil.which(name):
        return True
    query = shutil.which("dpkg-query")
    if query is None or platform.system() != "Linux":
        return False
    command = [query, "--show", "--showformat=${db:Status-Status}", "--", name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return run.returncode == 0 and run.stdout.strip() == "installed"
