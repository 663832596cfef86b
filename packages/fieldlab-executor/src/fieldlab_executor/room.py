"""How many processes of steps this node has room for at a time.

Each costs the supervisor three descriptors, and the node some memory even if it only waits. A fan-out that is wider
than that must wait for its turn: a node that runs out of descriptors loses children that it has started, and one that
runs out of memory loses whatever its kernel chooses.
"""

from __future__ import annotations

import contextlib
import resource

__all__ = ["Room", "files", "room"]

EACH = 4 << 20  # bytes of memory that a process of a step takes at least, while it waits
SHARE = 0.75  # of the memory that is free when the deployment begins
LEAST = 8
_DESCRIPTORS = 3  # of a child, in the supervisor
_OTHERS = 96  # descriptors that the supervisor needs besides


class Room:
    """``most`` processes at a time, because of ``why``."""

    def __init__(self, most: int, why: str) -> None:
        self.most, self.why = most, why


def files() -> tuple[int, int]:
    """Let this process have as many descriptors as it may; the limits before, which are those for steps."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a system that says "infinite" and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    return before


def room(memory: int | None = None) -> Room:
    """What there is room for now; ``memory``: the deployment's own limit, in bytes."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    by_files = max(LEAST, (descriptors - _OTHERS) // _DESCRIPTORS)
    free = [bytes_ for bytes_ in (memory, _available()) if bytes_ is not None]
    by_memory = max(LEAST, int(min(free) * SHARE) // EACH) if free else by_files
    if by_memory < by_files:
        return Room(by_memory, "of memory")
    return Room(by_files, f"of open files (ulimit -n is {descriptors})")


def _available() -> int | None:
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None
