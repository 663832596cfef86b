"""The limit of open files: a director needs more than systems give by default, and what it starts is not to have more.

Each executor that is connected takes two or three, and the default is 1,024. What the director starts gets the limit
back that the director was started with.

Else steps on local nodes would run, and batch systems submit, under a limit that nobody chose for them; and programs
that use ``select`` break beyond 1,024.
"""

from __future__ import annotations

import contextlib
import resource

__all__ = ["limit", "raise_limit", "set_limit"]

ENOUGH = 65_536  # some twenty thousand executors


def limit() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> int:
    """Have room for as many connections as the system allows, up to ``ENOUGH``; the limit as it was before."""
    found, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if most == resource.RLIM_INFINITY else min(most, ENOUGH)
    if found != resource.RLIM_INFINITY and found < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS has another bound, below an unlimited one: it stays
            set_limit(wanted)
    return found


def set_limit(files: int) -> None:
    """Set the limit of this process, and of what it starts from now on."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
