"""From the shell commands of a netunicorn task's ``requirements`` to what environments of ours are made of.

``pip install`` and ``apt-get install`` of plain names become packages and system packages: those are installed once,
are cached, and contradictions between pins are found before anything runs. Every other command stays a setup command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from importlib.metadata import version

from fieldlab_common.environment import Requirements

__all__ = ["base_packages", "requirements_of"]

_PIP = re.compile(r"(?:sudo\s+)?(?:python3?\s+-m\s+)?pip3?\s+install\s+(.+)")
_APT = re.compile(r"(?:sudo\s+)?apt(?:-get)?\s+(?:-y\s+)?install\s+(.+)")
_UPDATE = re.compile(r"(?:sudo\s+)?apt(?:-get)?\s+(?:-y\s+)?update(?:\s+-y)?")
_IDLE_OPTIONS = frozenset({"-y", "--yes", "-q", "-qq", "--quiet", "-U", "--upgrade", "--no-install-recommends"})
_SHELL = re.compile(r"[&|;<>$`()\n*?]")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9+.\-]*")


def base_packages() -> tuple[str, ...]:
    """What netunicorn's own executor brings along: netunicorn-base as it is here, and requests."""
    return (f"netunicorn-base=={version('netunicorn-base')}", "requests")


def requirements_of(commands: Sequence[str]) -> Requirements:
    """Sort commands into packages, system packages and setup commands, in order."""
    packages: list[str] = []
    system: list[str] = []
    setup: list[str] = []
    for command in (text.strip() for text in commands):
        if (names := _names(_PIP, command)) is not None:
            packages += names
        elif (names := _names(_APT, command)) is not None and all(map(_NAME.fullmatch, names)):
            system += names
        else:
            setup.append(command)
    if not any("apt" in command and not _UPDATE.fullmatch(command) for command in setup):
        setup = [command for command in setup if not _UPDATE.fullmatch(command)]  # done when it is needed
    if any("pip" in command for command in setup):
        packages.append("pip")  # environments have none unless it is asked for
    return Requirements(packages=tuple(packages), system_packages=tuple(system), setup=tuple(setup))


def _names(pattern: re.Pattern[str], command: str) -> list[str] | None:
    """The names that a plain install command installs; None if it is no such command."""
    match = pattern.fullmatch(command)
    if match is None or _SHELL.search(re.sub(r"(['\"]).*?\1", "", command)):
        return None
    try:
        words = [word for word in shlex.split(match[1]) if word not in _IDLE_OPTIONS]
    except ValueError:  # an open quotation mark: the shell will say so
        return None
    return words if words and not any(word.startswith(("-", ".", "/")) for word in words) else None
