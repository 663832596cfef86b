"""Environments: the execution space on a node, and what the tasks of a deployment need of it.

``Host`` is the node as it is, ``Venv`` a Python environment made for the packages asked for, ``Container`` an image.
Requirements of all tasks merge into one, in order and without doubles; pins that contradict each other are found
here, on the client, before anything is sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from fieldlab_common.errors import DefinitionError

__all__ = [
    "ENVIRONMENTS",
    "Container",
    "Environment",
    "Host",
    "Requirements",
    "Resources",
    "Venv",
    "check_count",
    "check_packages",
    "conflicting_pins",
    "parse_duration",
    "parse_size",
]


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What tasks need before they run: Python packages, system packages, set-up commands, environment variables."""

    packages: tuple[str, ...] = ()
    system_packages: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)

    def merged(self, other: Requirements) -> Requirements:
        """Both, in order, each entry once; a variable set by both takes the later value."""
        return Requirements(
            packages=tuple(dict.fromkeys((*self.packages, *other.packages))),
            system_packages=tuple(dict.fromkeys((*self.system_packages, *other.system_packages))),
            setup=tuple(dict.fromkeys((*self.setup, *other.setup))),
            env={**self.env, **other.env},
        )


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Base of the three kinds; ``kind`` is their name on the wire and in ``Node.environments``."""

    kind: ClassVar[str] = ""
    requirements: Requirements = field(default_factory=Requirements)

    def needing(self, requirements: Requirements) -> Environment:
        """The same environment with more requirements."""
        return replace(self, requirements=self.requirements.merged(requirements))


@dataclass(frozen=True, kw_only=True)
class Host(Environment):
    """The node as it is: its own Python, its own packages. Nothing is installed."""

    kind: ClassVar[str] = "host"


@dataclass(frozen=True, kw_only=True)
class Venv(Environment):
    """A virtual environment on the node, made from the requirements, cached by content. ``python`` like ``3.11``."""

    kind: ClassVar[str] = "venv"
    python: str = ""


@dataclass(frozen=True, kw_only=True)
class Container(Environment):
    """A container of ``image``, which must have a Python."""

    kind: ClassVar[str] = "container"
    image: str = ""


ENVIRONMENTS: Mapping[str, type[Environment]] = {cls.kind: cls for cls in (Host, Venv, Container)}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a deployment may use: CPUs, memory (bytes, or text like ``1 GiB``), walltime (seconds, or ``2h``)."""

    cpus: float | None = None
    memory: int | str | None = None
    walltime: float | str | None = None

    @property
    def memory_bytes(self) -> int | None:
        """Memory in bytes, or None if no limit was given."""
        return None if self.memory is None else parse_size(self.memory)

    @property
    def walltime_seconds(self) -> float | None:
        """Walltime in seconds, or None if no limit was given."""
        return None if self.walltime is None else parse_duration(self.walltime)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and value <= 0:
                raise DefinitionError(f"Resources({item.name}={value!r}): it must be more than zero.")
        _ = self.memory_bytes, self.walltime_seconds


def check_count(name: str, value: object) -> None:
    """Refuse what is neither None nor a whole number from 1."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise DefinitionError(f"{name}={value!r}: it is at least 1, or None.")


_SIZES = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZES.update({"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40})
_TIMES = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: int | str) -> int:
    """Bytes from a number or text such as ``512 MiB`` or ``2GB``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
    if not match or match[2].upper() not in _SIZES:
        raise DefinitionError(f"{value!r} is not a size.", advice="Give bytes, or text like '512 MiB' or '2 GB'.")
    return int(float(match[1]) * _SIZES[match[2].upper()])


def parse_duration(value: float | str) -> float:
    """Seconds from a number or text such as ``90s``, ``15m``, ``6h``, ``7d``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value))
    if not match or match[2] not in _TIMES:
        raise DefinitionError(
            f"{value!r} is not a duration.", advice="Give seconds, or text like '90s', '15m', '6h', '7d'."
        )
    return float(match[1]) * _TIMES[match[2]]


_PIN = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*==\s*([^\s;,*]+)\s*(?:;.*)?$")


_OPERATOR = r"(?:===|~=|==|!=|<=|>=|<|>)\s*[^\s,;<>=!~()]+"
_REQUIREMENT = re.compile(  # PEP 508, by name: extras, versions, a marker
    rf"\s*[A-Za-z0-9][A-Za-z0-9._-]*\s*(?:\[[^\]]*\])?\s*\(?\s*(?:{_OPERATOR}\s*(?:,\s*{_OPERATOR}\s*)*,?\s*)?\)?\s*(?:;.+)?"
)


def check_packages(packages: Iterable[str]) -> None:
    """Refuse what no installer takes; what names a file or an address, or is an option, is the installer's to judge."""
    for package in packages:
        if not isinstance(package, str) or not (
            _REQUIREMENT.fullmatch(package) or re.search(r"[/\\@]", package) or package.startswith(("-", "."))
        ):
            raise DefinitionError(
                f"{package!r} is no requirement of a Python package.", advice="Write it as for pip: 'dnspython>=2.6'."
            )


def conflicting_pins(packages: Iterable[str]) -> list[tuple[str, str, str]]:
    """Pairs of exact pins (``name==version``) of one distribution that contradict: (name, first, second)."""
    pins: dict[str, str] = {}
    found: list[tuple[str, str, str]] = []
    for package in packages:
        match = _PIN.match(package)
        if not match:
            continue
        name, version = re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]
        if pins.setdefault(name, version) != version:
            found.append((name, pins[name], version))
    return found
