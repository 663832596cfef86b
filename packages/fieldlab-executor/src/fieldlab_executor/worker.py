"""A child that does one shared job after another, and is made what it was before between them."""

from __future__ import annotations

import os
import sys
from _signal import SIGCHLD, getsignal  # type: ignore[import-not-found]
from _thread import _count
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any, NoReturn

from fieldlab_executor.child import Quiet, answer, end, flush, has_children
from fieldlab_executor.given import Given

__all__ = ["serve"]

MAX_WARM = 256  # tasks whose code a worker keeps loaded


def serve(given: Given, quiet: Quiet) -> NoReturn:
    """Do the job that ``given`` has taken, and those that follow, until one leaves something behind."""
    warm: dict[Any, Any] = {}
    connection = given.connection
    while _do(given, quiet, warm):
        job = connection.next_job()
        if job is None:
            break
        if len(warm) > MAX_WARM:
            del warm[next(iter(warm))]
        given.take(job)
    os._exit(0)


def _do(given: Given, quiet: Quiet, warm: dict[Any, Any]) -> bool:
    """Do the job; whether nothing of it is left, and another can be done here."""
    place = _Place()
    made, data = answer(given, quiet, warm)
    restored = place.restored(given.connection.threads)
    if restored:
        flush(sys.stdout)
        flush(sys.stderr)
        made["usage"] = place.usage()
    else:
        end(quiet)
    given.finish(made, data)
    return restored


class _Place:
    """What a worker was before a job; and what the job used."""

    def __init__(self) -> None:
        self._env = dict(_variables())
        self._children = getrusage(RUSAGE_CHILDREN).ru_minflt
        try:
            fd = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            pass
        else:
            os.write(fd, b"5")  # the peak of memory is counted anew (proc(5))
            os.close(fd)
        self._cpu = _cpu()[0]

    def restored(self, threads: int) -> bool:
        """Put back what can be put back; False if the job left threads, or had processes below it."""
        if _variables() != self._env:
            os.environ.clear()
            os.environ.update({os.fsdecode(name): os.fsdecode(value) for name, value in self._env.items()})
        if _count() != threads or getsignal(SIGCHLD):
            return False
        return getrusage(RUSAGE_CHILDREN).ru_minflt == self._children and not has_children()

    def usage(self) -> tuple[int, int]:
        """CPU time of the job in microseconds, and the peak of memory in KiB while it ran."""
        cpu, peak = _cpu()
        return max(0, cpu - self._cpu), peak


def _cpu() -> tuple[int, int]:
    used = getrusage(RUSAGE_SELF)
    return int(1e6 * (used.ru_utime + used.ru_stime)), used.ru_maxrss


def _variables() -> dict[bytes, bytes]:
    """The environment variables as ``os.environ`` keeps them: to decode all of them costs more than an empty step."""
    return os.environ._data  # type: ignore[attr-defined,no-any-return]
