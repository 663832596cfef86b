"""This machine as a node: what ``fl.run`` and ``fl.plan`` take when no node is given."""

from __future__ import annotations

import os
import platform
import socket
import sys

from fieldlab_common.node import Node

__all__ = ["this_node"]

_MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}
_SYSTEMS = {"darwin": "macos", "win32": "windows"}


def this_node(name: str = "localhost") -> Node:
    """This machine, with what is known of it without asking anybody."""
    system = _SYSTEMS.get(sys.platform, sys.platform)
    machine = platform.machine()
    return Node.dummy(
        name,
        architecture=f"{'darwin' if system == 'macos' else system}/{_MACHINES.get(machine, machine)}",
        os=system,
        python=(f"{sys.version_info.major}.{sys.version_info.minor}",),
        environments=("host", "venv"),
        cpus=os.cpu_count() or 1,
        hostname=socket.gethostname(),
        kernel=platform.release(),
        ipv4="127.0.0.1",
        **_memory(),
    )


def _memory() -> dict[str, int]:
    try:
        return {"memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    except (AttributeError, ValueError, OSError):
        return {}  # this platform does not tell
