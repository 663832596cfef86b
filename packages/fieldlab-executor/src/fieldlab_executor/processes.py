"""Finding and ending processes: who descends from whom, by what mark an orphan is known, and the last sweep.

A step's process may start others, put them into sessions of their own and die before them. They are then children of
the spawner (a *subreaper*, see prctl(2)), and are told apart by marks that they cannot lose by accident: their session,
or, for those that only forked, the name of the process, or, for those that ran a program, ``FIELDLAB_ATTEMPT``
in their environment. What has lost all marks is ended with the deployment at the latest.

Everything here reads /proc. A process that is gone meanwhile is no error anywhere.
"""

from __future__ import annotations

import os
import select
import time

TYPE_CHECKING = False  # the parent of all steps has this module, and is kept small (``spawner``)
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "ATTEMPT",
    "Process",
    "await_any",
    "become_subreaper",
    "below",
    "children",
    "descendants",
    "describe",
    "mark",
    "marked",
    "process",
    "processes",
    "send",
    "sweep",
]

ATTEMPT = "FIELDLAB_ATTEMPT"
LOOK_AGAIN = 0.05  # seconds: a sweep that hears of no end looks for what came into being meanwhile
_PR_SET_CHILD_SUBREAPER = 36
_SIGKILL = 9


class Process:
    """One line of /proc/<pid>/stat, as far as it matters here."""

    __slots__ = ("name", "parent", "pid", "session", "state")

    def __init__(self, pid: int, name: str, state: str, parent: int, session: int) -> None:
        self.pid, self.name, self.state, self.parent, self.session = pid, name, state, parent, session

    @property
    def alive(self) -> bool:
        """Whether it still runs: neither a zombie nor dead."""
        return self.state not in "ZXx"


def become_subreaper() -> None:
    """Make orphans among the descendants of this process its children; kept across exec, not inherited by fork."""
    import ctypes  # costs memory; the spawner gets the mark across its exec and never loads it

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _slurp(path: str) -> bytes:
    """The content of a file in /proc; empty if the process is gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    except OSError:
        return b""
    finally:
        os.close(fd)


def process(pid: int) -> Process | None:
    """What /proc says about ``pid``, or None if it is gone."""
    text = _slurp(f"/proc/{pid}/stat")
    close = text.rfind(b")")
    if close < 0:
        return None
    state, parent, _, session = text[close + 2 :].split(None, 4)[:4]
    name = text[text.find(b"(") + 1 : close].decode(errors="replace")
    return Process(pid, name, state.decode(), int(parent), int(session))


def processes() -> dict[int, Process]:
    """All processes, by pid."""
    found = (process(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return {one.pid: one for one in found if one is not None}


def children(pid: int) -> list[int]:
    """The pids of the children of process ``pid``, of all its threads."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        found += map(int, _slurp(f"/proc/{pid}/task/{thread}/children").split())
    return found


def below(root: int) -> list[int]:
    """The pids of all that descends from ``root``, found without a look at every other process of the machine."""
    found: list[int] = []
    queue = [root]
    for pid in queue:
        more = children(pid)
        found += more
        queue += more
    return found


def descendants(root: int, table: dict[int, Process] | None = None) -> list[Process]:
    """Everything alive below ``root``, parents before children."""
    table = processes() if table is None else table
    below: dict[int, list[Process]] = {}
    for one in table.values():
        below.setdefault(one.parent, []).append(one)
    found, queue = [], [root]
    for pid in queue:
        for one in below.get(pid, ()):
            queue.append(one.pid)
            if one.alive:
                found.append(one)
    return found


def mark(pid: int) -> str:
    """The name that the step's process ``pid`` bears; what it forks bears it too, until it runs a program."""
    return f"fl:{pid}"


def marked(one: Process, attempt: int) -> bool:
    """Whether ``one`` bears a mark of the attempt whose process has, or had, the pid ``attempt``."""
    if one.session == attempt or one.name == mark(attempt):
        return True
    wanted = f"{ATTEMPT}={attempt}".encode()
    return wanted in _slurp(f"/proc/{one.pid}/environ").split(b"\0")


def describe(pid: int) -> str:
    """``pid: command line``, for people."""
    words = _slurp(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    if not words and (one := process(pid)):
        words = f"[{one.name}]"
    return f"{pid}: {words[:200]}"


def send(pids: Iterable[int], number: int) -> int:
    """Send a signal to each; the number of processes that were there to get it."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, number)
            reached += 1
        except (ProcessLookupError, PermissionError):
            continue
    return reached


def sweep(deadline: float, *, reap: Callable[[int, int], object] = lambda pid, status: None) -> list[Process]:
    """Kill and reap everything below this process until nothing is left, or ``deadline`` (monotonic) is over.

    Returns what could not be killed. This process must be a subreaper, and must not wait for children elsewhere. What
    forks while it is swept, or comes down to this process from a parent that cannot be killed, is found at the next
    look: the sweep takes no longer than the kernel does to end what it was told to.
    """
    me = os.getpid()
    while True:
        left = descendants(me)
        send((one.pid for one in left), _SIGKILL)
        direct = children(me)
        if not left and not direct:
            return []
        if time.monotonic() >= deadline:
            return left
        await_any(direct, min(deadline, time.monotonic() + LOOK_AGAIN))
        _reap_all(reap)


def _reap_all(reap: Callable[[int, int], object]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        reap(pid, status)


def await_any(pids: Iterable[int], deadline: float) -> None:
    """Wait until one of these children has ended."""
    poll = select.poll()
    fds = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except OSError:
            continue
        fds.append(fd)
        poll.register(fd, select.POLLIN)
    try:
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    finally:
        for fd in fds:
            os.close(fd)
