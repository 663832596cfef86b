"""Whether the kernel has ended a process for want of memory, by its own counters.

A SIGKILL that nobody here sent and a counter that has grown since the last look are taken for one event. The cgroup's
counter (``memory.events``, or version 1's ``memory.oom_control``) is believed before the machine's (``/proc/vmstat``),
because others share the machine.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["OutOfMemory"]


class OutOfMemory:
    """Remembers the counters; ``happened`` says whether they have grown since it was asked last, or made."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self._sources = [path for path in (_events(proc, cgroups), proc / "vmstat") if path is not None][:1]
        self._seen = self._count()

    def happened(self) -> bool:
        """Whether a process was ended for want of memory since the last look."""
        now = self._count()
        grown, self._seen = now > self._seen, now
        return grown

    def _count(self) -> int:
        return sum(_counter(path) for path in self._sources)


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
