"""A control group (cgroup v2) of the deployment's own, for all processes of its steps; see cgroups(7).

It stands below the first group, from this process's own upwards, in which one can be made: a slice that systemd gave to
its user, a container's own, or root's. No group is passed over that holds a limit itself, so nothing gets out of the
limits that the executor was put under. Processes get into it with the spawner, and none leaves it but by root's hand.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Group", "make", "parent"]

PREFIX = "fieldlab-"
_PERIOD = 100_000  # microseconds, of cpu.max
_LIMITS = ("memory.max", "memory.high", "cpu.max", "pids.max")
_ROUNDS = 10  # of moving processes: they may fork meanwhile
_LEAF = "fieldlab.init"  # where the processes of a group go that others are made below


class Group:
    """A control group that was made for a deployment; ``cpus``: whether it limits them, too."""

    def __init__(self, path: Path, cpus: bool) -> None:
        self.path, self.cpus = path, cpus

    @property
    def events(self) -> Path:
        """The file that counts what the kernel ended."""
        return self.path / "memory.events"

    def enter(self, pid: int) -> None:
        """Move a process into it; what that starts from now on is in it too.

        Raises:
            OSError: it cannot be moved.
        """
        (self.path / "cgroup.procs").write_text(str(pid))

    def used(self) -> int:
        """The most memory in bytes that it held so far, or now if the kernel does not remember; 0: not known."""
        for name in ("memory.peak", "memory.current"):
            with contextlib.suppress(OSError, ValueError):
                return int((self.path / name).read_text())
        return 0

    def close(self) -> None:
        """Remove it, if nothing lives in it."""
        with contextlib.suppress(OSError):
            self.path.rmdir()


def parent(ours: Iterable[int] = (), *, proc: Path = Path("/proc"), controller: str = "memory") -> Path | None:
    """The group below which one with limits can be made; None: there is none, or this process may not.

    ``ours``: processes that may be moved to a leaf, besides this one, to make room: a group that has others below it
    with limits cannot have processes itself. All processes of a container may, in a group that is the container's own.
    """
    found = _own(proc)
    if found is None:
        return None
    top, path = found
    while True:
        if _takes(path, {os.getpid(), *ours}, controller):
            return path
        if path == top or any(_limited(path, name) for name in _LIMITS):
            return None
        path = path.parent


def make(
    memory: int | None, cpus: float | None, ours: Iterable[int] = (), *, proc: Path = Path("/proc")
) -> Group | None:
    """Make a group that holds its processes to so many bytes of memory, and CPUs; None: that is not possible here."""
    above = parent(ours, proc=proc, controller="memory" if memory is not None else "cpu")
    if above is None:
        return None
    _sweep(above)
    path = above / f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    try:
        _enable(above, memory is not None, cpus is not None)
        path.mkdir()
        if memory is not None:
            _limit_memory(path, memory)
    except OSError:
        with contextlib.suppress(OSError):
            path.rmdir()
        return None
    limits_cpus = False
    if cpus is not None:
        with contextlib.suppress(OSError):  # the memory is held all the same
            (path / "cpu.max").write_text(f"{max(1000, round(cpus * _PERIOD))} {_PERIOD}")
            limits_cpus = True
    if memory is None and not limits_cpus:
        path.rmdir()
        return None
    return Group(path, limits_cpus)


def _limit_memory(path: Path, memory: int) -> None:
    (path / "memory.max").write_text(str(memory))
    with contextlib.suppress(OSError):  # a kernel without swap has no such file
        (path / "memory.swap.max").write_text("0")
    (path / "memory.oom.group").write_text("0")  # one process is ended, not all of them


def _own(proc: Path) -> tuple[Path, Path] | None:
    """Where the hierarchy is mounted, and the group of this process in it."""
    try:
        lines = (proc / "self" / "mountinfo").read_text().splitlines()
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in groups if line.startswith("0::/")), None)
    if own is None or "/.." in own:  # it is outside of the namespace that we see
        return None
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if rest.startswith("cgroup2 "):
            root, point = fields.split(" ")[3:5]
            inner = own if root == "/" else own.removeprefix(root)
            if inner != own or root == "/":
                return Path(point), Path(point + inner.rstrip("/"))
    return None


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _limited(path: Path, name: str) -> bool:
    return _words(path / name)[:1] not in ([], ["max"])


def _takes(path: Path, ours: set[int], controller: str) -> bool:
    """Whether a group with that limit can be made below ``path``."""
    if controller not in _words(path / "cgroup.controllers"):
        return False
    if not os.access(path, os.W_OK) or not os.access(path / "cgroup.procs", os.W_OK):
        return False
    if controller in _words(path / "cgroup.subtree_control"):
        return True
    return os.access(path / "cgroup.subtree_control", os.W_OK) and (
        _is_root(path) or set(map(int, _words(path / "cgroup.procs"))) <= ours or _is_containers(path)
    )


def _is_root(path: Path) -> bool:
    """Whether it is the machine's: the one group that may have both processes and groups with limits."""
    return not (path / "cgroup.type").exists()


def _is_containers(path: Path) -> bool:
    """Whether it is the topmost that this process can see, and not the machine's: all in it is one container's."""
    return not _is_root(path) and not (path.parent / "cgroup.procs").exists()


def _enable(path: Path, memory: bool, cpus: bool) -> None:
    """Let groups below ``path`` have limits."""
    wanted = [name for name, on in (("memory", memory), ("cpu", cpus)) if on]
    missing = [name for name in wanted if name not in _words(path / "cgroup.subtree_control")]
    if missing and not _is_root(path):
        _make_room(path)
    for name in missing:
        try:
            (path / "cgroup.subtree_control").write_text(f"+{name}")
        except OSError:
            if name == wanted[0]:
                raise


def _make_room(path: Path) -> None:
    """Move the processes of a group to a leaf of it."""
    leaf = path / _LEAF
    for _ in range(_ROUNDS):
        pids = _words(path / "cgroup.procs")
        if not pids:
            return
        leaf.mkdir(exist_ok=True)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)


def _sweep(above: Path) -> None:
    """Remove the groups of executors that were killed."""
    for path in above.glob(f"{PREFIX}*-*"):
        pid = path.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            with contextlib.suppress(OSError):  # something lives in it
                path.rmdir()
