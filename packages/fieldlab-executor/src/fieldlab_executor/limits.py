"""How the steps of a deployment are held to its ``Resources``: memory and CPUs.

Where a control group can be made (``cgroups``), all processes of the steps are in it: the kernel ends one when all of
them together are over. Elsewhere on Linux each process has the limit for itself (RLIMIT_DATA, see setrlimit(2): its
private writable memory), and is refused more; a watch adds them up while no measured step runs, and ends the step that
uses most when the sum is over. Both are inherited by whatever a step starts. Other systems hold nothing, and say so.

A step that was ended or refused for that reason is told so: which limit, how it is held, what was used, what to do.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

from fieldlab_common.environment import Resources

from fieldlab_executor import processes
from fieldlab_executor.loop import Loop, Timer
from fieldlab_executor.oom import OutOfMemory

if TYPE_CHECKING:
    from fieldlab_executor.attempt import Attempt
    from fieldlab_executor.cgroups import Group

__all__ = ["Limits", "Watch", "anonymous", "held"]

NEAR = 0.8  # of its limit: a process that crashes there most likely crashed for want of memory
LOOK = 1.0  # seconds between two looks at the sum
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SAID = "as Resources(memory=...) says"
_ADVICE = "Give it more (fl.Resources(memory=...)), let it work in smaller parts, or run fewer steps at a time."


def held() -> str:
    """How this node would hold a limit of memory: ``group`` (all steps together), ``process`` (each), or nothing."""
    from fieldlab_executor import cgroups

    if not sys.platform.startswith("linux"):
        return ""
    return "process" if cgroups.parent() is None else "group"


class Limits:
    """The limits of one deployment; ``pids``: processes of the executor, which may be moved to make a group."""

    def __init__(self, resources: Resources, pids: Collection[int] = ()) -> None:
        self._memory, self._cpus = resources.memory_bytes, resources.cpus
        self._group = self._make_group(pids)
        self._linux = sys.platform.startswith("linux")
        # One for CPUs alone may count no memory.
        self.oom = OutOfMemory(self._group.events if self._group is not None and self._group.events.is_file() else None)

    def _make_group(self, pids: Iterable[int]) -> Group | None:
        if self._memory is None and self._cpus is None:
            return None
        from fieldlab_executor import cgroups

        return cgroups.make(self._memory, self._cpus, pids)

    @property
    def of_process(self) -> int | None:
        """What each process may have, where there is no group to hold all of them."""
        return self._memory if self._group is None and self._linux else None

    @property
    def grouped(self) -> bool:
        """Whether the kernel chooses whom to end among all processes of the steps."""
        return self._group is not None and self._memory is not None

    def enter(self, pid: int) -> None:
        """Hold the spawner, and all that it starts from now on, in the group; without one, it sees to it itself."""
        if self._group is None:
            return
        try:
            self._group.enter(pid)
        except OSError:  # somebody has taken the group away, or the right to it: then as without one
            self.close()
            self._group, self.oom = None, OutOfMemory()

    def told(self) -> str:
        """What holds the steps, for the log; nothing if nothing was asked for."""
        said = []
        if self._memory is not None:
            said.append(f"Memory: {size(self._memory)} {self._how()}.")
        if self._cpus is not None:
            by = (
                "held by a control group (cpu.max)"
                if self._group is not None and self._group.cpus
                else "as so many shared workers at a time; no control group could be made to hold more to it"
            )
            said.append(f"CPUs: {self._cpus:g}, {by}.")
        return " ".join(said)

    def _how(self) -> str:
        if self._group is not None:
            return "for all steps together, held by a control group (memory.max)"
        if self._linux:
            return (
                "for each process of the steps (RLIMIT_DATA), and for all of them together as long as no measured step"
                " runs; no control group could be made"
            )
        return "is not held: this system has no way for it"

    def refused(self, peak: int) -> str:
        """What to say of a process that was refused more memory and had used up to ``peak`` bytes."""
        if self.of_process is None:
            return ""
        return f" Its process may use {size(self.of_process)}, {_SAID}, and had used up to {size(peak)}. {_ADVICE}"

    def ended(self, peak: int) -> str:
        """What to say of a process that the kernel ended, and that had used up to ``peak`` bytes."""
        if self._group is None or self._memory is None:
            return "The kernel ended the process: the node, or its limit, had no memory left."
        return (
            f"The kernel ended it: all steps of the deployment together may use {size(self._memory)}, {_SAID}. "
            f"They had used up to {size(self._group.used())}, its process {size(peak)}. {_ADVICE}"
        )

    def over(self, used: int, own: int) -> str:
        """What to say of a step that is ended because all together use ``used`` bytes; it has ``own`` of them."""
        return (
            f"All steps of the deployment together may use {size(self._memory or 0)}, {_SAID}. "
            f"They used {size(used)}, and it used most: {size(own)}. {_ADVICE}"
        )

    def near(self, peak: int) -> bool:
        """Whether a process that used ``peak`` bytes came near to what each may have."""
        return self.of_process is not None and peak >= NEAR * self.of_process

    def exceeded(self, used: int) -> bool:
        """Whether that is more than all may have, where a sum is all that there is."""
        return self.of_process is not None and used > self.of_process

    def close(self) -> None:
        """Give up the group; nothing is alive in it."""
        if self._group is not None:
            self._group.close()


class Watch:
    """Looks at the sum of what the steps of a deployment use, while any of them runs and none that is measured.

    ``root`` is the pid of the spawner, ``attempts`` those that have a process.
    """

    def __init__(
        self, loop: Loop, limits: Limits, root: Callable[[], int], attempts: Callable[[], Collection[Attempt]]
    ) -> None:
        self._loop, self._limits, self._root, self._attempts = loop, limits, root, attempts
        self._timer: Timer | None = None
        self._paused = limits.of_process is None

    def wake(self) -> None:
        """An attempt has begun."""
        if self._timer is None and not self._paused:
            self._timer = self._loop.after(LOOK, self._look)

    def pause(self, measuring: bool) -> None:
        """A measured step runs, or no more."""
        self._paused = measuring or self._limits.of_process is None
        if self._paused and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.wake()

    def _look(self) -> None:
        self._timer = None
        attempts = self._attempts()
        if not attempts:
            return
        used = anonymous(processes.below(self._root()))
        if self._limits.exceeded(used):
            own, worst = max(((anonymous(one.members()), one) for one in attempts), key=lambda pair: pair[0])
            worst.over = self._limits.over(used, own)
            worst.kill()
        self.wake()


def anonymous(pids: Iterable[int]) -> int:
    """The memory in bytes that these processes have for themselves: resident, and of no file (proc(5), statm)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/statm", "rb") as file:
                words = file.read().split()
            total += (int(words[1]) - int(words[2])) * _PAGE
    return total


def size(count: int) -> str:
    """A size for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} bytes"
