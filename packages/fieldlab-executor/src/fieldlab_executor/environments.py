"""Makes the environment of a deployment, or finds it made: gives the interpreter on which its steps run.

``Host`` is an interpreter of the node, which must have what is asked for: nothing is installed. A ``Venv`` is made once
for what is asked of it and kept on the shelf (``shelf``) under a key: a digest of its requirements, the interpreter and
the platform. System packages are the node's and not the environment's: they are looked for each time. Set-up commands
belong to the environment and run once, when it is made.

In a container that a connector made, ``Container`` is one of these two (``_inside``).

``find`` takes what is there, in milliseconds and without a builder or the network: so a node that is offline works with
what it has. ``ensure`` also makes what is not.

Requirements are the user's and may do what the user may do: set-up commands go to a shell, because that is what
they are written for.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

from fieldlab_common.environment import Container, Environment, Host, Requirements, Venv
from fieldlab_common.errors import UnsupportedError

from fieldlab_executor import system
from fieldlab_executor.builders import Builder, Log, PrepareFailed
from fieldlab_executor.cache import cache_folder
from fieldlab_executor.interpreters import find_python
from fieldlab_executor.shelf import Bounds, Held, Shelf, Unavailable

__all__ = ["BUILD_SECONDS", "Made", "PrepareFailed", "ensure", "find", "installer", "shelf_of"]

BUILD_SECONDS = 1500.0  # for an environment to be made; less than a director waits for it
PROBE_SECONDS = 60.0
CONTAINER = "FIELDLAB_CONTAINER"  # the variable that names the image of the container an executor is in
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
_UV_PLACES = ("~/.local/bin/uv", "~/.cargo/bin/uv")  # where its installer puts it, if it is not on PATH
# The two programs read the same setting under two names; where one is given, it is meant for whichever is there.
_INDEX = (("UV_DEFAULT_INDEX", "UV_INDEX_URL"), ("PIP_INDEX_URL",))


class Made:
    """An environment that is there: its interpreter, and the variables that a step's process has in it.

    With them a step finds the programs of a virtual environment first. It is held, and so not removed from the shelf,
    until it is closed.
    """

    def __init__(self, python: str, variables: Mapping[str, str], held: Held | None = None) -> None:
        self.python = python
        self.variables = {**(_activated(held.folder) if held is not None else {}), **variables}
        self._held = held

    def close(self) -> None:
        """Let go of it."""
        if self._held is not None:
            self._held.close()


def shelf_of(cache: Path) -> Shelf:
    """The shelf in a cache."""
    return Shelf(cache / "venvs")


def find(environment: Environment, *, python: str = "", cache: Path | None = None) -> Made | None:
    """The environment, if all of it is there. ``python``: the version in which the tasks' code was written, or empty.

    Raises:
        PrepareFailed: the node as it is was asked for, and lacks something.
        UnsupportedError: the node cannot have such an environment.
    """
    environment = _inside(environment)
    requirements = environment.requirements
    if isinstance(environment, Venv):
        if system.missing(requirements.system_packages):
            return None
        held = shelf_of(cache or cache_folder()).find(_key(requirements, _base(environment, python)))
        return Made(_python_of(held.folder), requirements.env, held) if held is not None else None
    if not isinstance(environment, Host):
        raise UnsupportedError(
            f"This executor cannot make a {environment.kind!r} environment.",
            advice="Use a Venv or Host environment for this node.",
        )
    path = find_python(python)
    _require_of_host(path, requirements)
    return Made(path, requirements.env)


def ensure(
    environment: Environment,
    *,
    python: str = "",
    cache: Path | None = None,
    log: Log = print,
    seconds: float = BUILD_SECONDS,
) -> Made:
    """Make the environment if it is not there. What builders say goes to ``log``; ``seconds`` is the time they have.

    Raises:
        PrepareFailed: a builder failed, or needs what the node does not have.
        UnsupportedError: the node cannot have such an environment.
    """
    cache, environment = cache or cache_folder(), _inside(environment)
    found = find(environment, python=python, cache=cache)
    if found is None:
        assert isinstance(environment, Venv)  # the node as it is was found, or an error
        found = _venv(environment, _base(environment, python), cache, log, seconds)
    if isinstance(environment, Venv):
        for key in shelf_of(cache).evict(Bounds.of(os.environ), time.time()):
            log(f"Removed environment {key}: it was not used for long, or took up room that was needed.")
    return found


def _inside(environment: Environment) -> Environment:
    """What a container is to an executor in it, which it is when whoever made the container says so: a virtual
    environment where something is to be installed, else the container as it is."""
    if not isinstance(environment, Container) or CONTAINER not in os.environ:
        return environment
    wants = environment.requirements
    made = wants.packages or wants.system_packages or wants.setup
    return Venv(requirements=wants) if made else Host(requirements=wants)


# --- the node as it is -----------------------------------------------------------------------------------------------


def _require_of_host(python: str, requirements: Requirements) -> None:
    if requirements.setup:
        raise PrepareFailed("The tasks have setup commands, and Host runs none.", advice="Use env=fl.Venv().")
    lacking = _lacking(python, requirements.packages)
    if lacking:
        raise PrepareFailed(
            f"The node's {python} lacks {', '.join(lacking)}, and Host installs nothing.",
            advice="Use env=fl.Venv(), or install them on the node.",
        )
    if missing := " ".join(system.missing(requirements.system_packages)):
        raise PrepareFailed(
            f"The node lacks the system packages {missing}, and Host installs nothing.",
            advice=f"Use env=fl.Venv() where the executor is root, or ask the node's owner: apt-get install {missing}",
        )


def _lacking(python: str, wanted: tuple[str, ...]) -> list[str]:
    """The distributions that are not there, of whatever version: what a node has, its owner chose."""
    names = [
        match[0] for match in (re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*", package.strip()) for package in wanted) if match
    ]
    if not names:
        return []
    done = subprocess.run(
        [python, "-c", _LACKING, *names], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
    )
    if done.returncode:
        said = "".join(done.stderr.splitlines()[-1:])
        raise PrepareFailed(f"The node's {python} cannot be asked for its packages: {said}")
    return done.stdout.split()


# --- virtual environments --------------------------------------------------------------------------------------------


def _base(environment: Venv, python: str) -> str:
    if environment.python and python and environment.python != python:
        raise PrepareFailed(
            f"The environment is to have Python {environment.python}, and the code of the tasks travels for {python}.",
            advice=f"Leave out python=, submit from Python {environment.python}, or put the tasks into a module.",
        )
    return find_python(environment.python or python)


def _key(requirements: Requirements, python: str) -> str:
    content = {
        "python": os.path.realpath(python),
        "platform": sysconfig.get_platform(),
        "packages": requirements.packages,
        "system": requirements.system_packages,
        "setup": requirements.setup,
        "env": dict(requirements.env),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _venv(environment: Venv, base: str, cache: Path, log: Log, seconds: float) -> Made:
    requirements, shelf = environment.requirements, shelf_of(cache)
    builder = Builder(log, cache, seconds)
    if missing := system.missing(requirements.system_packages):
        system.install(missing, builder)

    def waits() -> None:
        log("Another process uses or makes this environment; waiting for it.")

    what = (*requirements.packages, *requirements.setup)
    try:
        held = shelf.make(
            _key(requirements, base),
            lambda place: _build(place, base, requirements, builder),
            what,
            seconds=seconds,
            waits=waits,
        )
    except Unavailable as error:
        raise PrepareFailed(f"The environment could not be made: {error}.", transient=True) from error
    return Made(_python_of(held.folder), requirements.env, held)


def _python_of(folder: Path) -> str:
    return str(folder / "bin" / "python")


def _activated(folder: Path) -> dict[str, str]:
    return {
        "VIRTUAL_ENV": str(folder),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def _build(place: Path, base: str, requirements: Requirements, builder: Builder) -> None:
    uv = _uv()
    variables = {"UV_PYTHON_DOWNLOADS": "never", **_index_variables(os.environ)}
    if uv:
        builder.run([uv, "venv", "--quiet", "--python", base, str(place)], "Making the environment", env=variables)
        installer = [uv, "pip", "install", "--python", _python_of(place)]
    else:
        installer = _plain_venv(place, base, builder, pip=bool(requirements.packages))
    if requirements.packages:
        what = f"Installing {', '.join(requirements.packages)}"
        builder.run([*installer, "--", *requirements.packages], what, env=variables)
    activated = {**_activated(place), **requirements.env}
    for command in requirements.setup:
        builder.run(["/bin/sh", "-c", command], f"The setup command {command!r}", env=activated)


def _plain_venv(place: Path, base: str, builder: Builder, *, pip: bool) -> list[str]:
    """Make it with what comes with Python; the command that installs into it."""
    own = pip and _has(base, "ensurepip")
    making = [base, "-m", "venv", *([] if own else ["--without-pip"]), str(place)]
    builder.run(making, "Making the environment", advice="On Debian and Ubuntu it takes the package python3-venv.")
    quiet = ["--no-input", "--disable-pip-version-check"]
    if own or not pip:
        return [_python_of(place), "-m", "pip", "install", *quiet]
    if not _has(base, "pip"):
        raise PrepareFailed(
            f"The node has neither uv nor a pip for {base}, so no packages can be installed.",
            advice="Install uv on the node, or (Debian, Ubuntu) the package python3-venv.",
        )
    return [base, "-m", "pip", "--python", _python_of(place), "install", *quiet]


def _has(python: str, module: str) -> bool:
    """Whether that interpreter has a module; Debian leaves some of the standard ones out."""
    code = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({module!r}) is None)"
    done = subprocess.run([python, "-c", code], capture_output=True, timeout=PROBE_SECONDS, check=False)
    return done.returncode == 0


def _uv() -> str | None:
    return shutil.which("uv") or next(
        (path for path in map(os.path.expanduser, _UV_PLACES) if os.access(path, os.X_OK)), None
    )


def installer() -> str:
    """What this node would make environments with: the path of uv, or ``pip``; empty: it has neither."""
    return _uv() or ("pip" if _has(sys.executable, "ensurepip") or _has(sys.executable, "pip") else "")


def _index_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The package index that is set for one of uv and pip, for the other."""
    for names, others in (_INDEX, _INDEX[::-1]):
        given = next((environ[name] for name in names if environ.get(name)), "")
        if given and not any(environ.get(other) for other in others):
            return {others[0]: given}
    return {}
