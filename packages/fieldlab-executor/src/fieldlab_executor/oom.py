"""Whether the kernel has ended a process for want of memory, by its own counters.

A SIGKILL that nobody here sent and a counter that has just grown are taken for one event. The counter of the control
group that was made for the steps is believed before that of the executor's own group, and this before the machine's
(``/proc/vmstat``), because others share the machine.
"""

from __future__ import annotations

import math
from pathlib import Path

__all__ = ["OutOfMemory"]


AT_ONCE = 1.0  # seconds: ends that are looked at within that time may have one cause


class OutOfMemory:
    """Remembers a counter; ``happened`` says whether it has grown lately. ``events``: the file, if it is known."""

    def __init__(
        self, events: Path | None = None, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")
    ) -> None:
        self._source = events or _events(proc, cgroups) or proc / "vmstat"
        self._seen = _counter(self._source)
        self._grown = -math.inf

    def happened(self, now: float) -> bool:
        """Whether a process was ended for want of memory since the last look, or that look was just now."""
        count = _counter(self._source)
        if count > self._seen:
            self._seen, self._grown = count, now
        return now - self._grown <= AT_ONCE


def _events(proc: Path, cgroups: Path) -> Path | None:
    """The file with the counters of this process's cgroup, if its memory is accounted for."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            path = cgroups / group.lstrip("/") / "memory.events"
        elif controllers == "memory":
            path = cgroups / "memory" / group.lstrip("/") / "memory.oom_control"
        else:
            continue
        if path.is_file():
            return path
    return None


def _counter(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    except (OSError, ValueError):
        pass
    return 0
