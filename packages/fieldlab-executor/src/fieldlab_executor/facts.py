"""What a node says about itself: its ``Node``, as data.

Everything is read from the node as it is now; nothing is guessed, and what cannot be found is left out.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from fieldlab_common.node import Node

from fieldlab_executor import limits
from fieldlab_executor.interpreters import interpreters

__all__ = ["addresses", "cpu_of", "facts"]

_OS = {"Linux": "linux", "Darwin": "macos", "Windows": "windows"}
_CPU = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64", "armv7l": "arm/v7", "i686": "386"}
# Nothing is sent to them: a datagram socket that is connected knows the address it would send from.
_ELSEWHERE = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))


def facts(name: str = "") -> Node:
    """This node; ``name`` is its hostname unless given."""
    system = _OS.get(platform.system(), platform.system().lower())
    cpu = cpu_of(platform.machine())
    return Node(
        name=name or platform.node() or "localhost",
        architecture=f"{'darwin' if system == 'macos' else system}/{cpu}",
        os=system,
        python=tuple(interpreters()),
        environments=("host", "venv"),
        properties={key: value for key, value in _properties().items() if value not in (None, "", [])},
    )


def cpu_of(machine: str) -> str:
    """A processor's architecture as containers name it; ``machine`` is how uname(2) does."""
    return _CPU.get(machine.lower(), machine.lower())


def _properties() -> Mapping[str, Any]:
    sources: dict[str, Callable[[], Any]] = {
        "hostname": platform.node,
        "kernel": platform.release,
        "cpus": _cpus,
        "memory": _memory,
        "ipv4": lambda: _address(*_ELSEWHERE[0]),
        "ipv6": lambda: _address(*_ELSEWHERE[1]),
        "root": lambda: os.geteuid() == 0,
        "memory_limit": limits.held,
        "distribution": _distribution,
    }
    found: dict[str, Any] = {}
    for key, source in sources.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found[key] = source()
    return found


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _distribution() -> str:
    release = platform.freedesktop_os_release()
    return f"{release.get('ID', '')} {release.get('VERSION_ID', '')}".strip()


def _address(family: int, elsewhere: str) -> str:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((elsewhere, 9))
        return str(probe.getsockname()[0])


def addresses() -> tuple[str, ...]:
    """The addresses under which others may reach this node."""
    found = []
    for family, elsewhere in _ELSEWHERE:
        with contextlib.suppress(OSError):
            found.append(_address(family, elsewhere))
    return tuple(found) or (("127.0.0.1",) if sys.platform else ())
