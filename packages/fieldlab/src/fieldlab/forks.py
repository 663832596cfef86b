"""What must be made anew in the child of a fork: locks that another thread may have held, connections that are shared.

A program may fork with a client open (``multiprocessing``, a web server's workers). The child's copy of a lock stays
locked for ever if a thread of the parent had it, and two processes that read one connection each get half an answer.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Forkable", "made_anew"]


class Forkable(Protocol):
    """What has something that a child of a fork may not share."""

    def after_fork(self) -> None:
        """Make it anew; called in the child, where no other thread runs yet."""
        ...


_KNOWN: weakref.WeakSet[Forkable] = weakref.WeakSet()


def made_anew(one: Forkable) -> None:
    """Have ``one.after_fork()`` called in the child of every fork, for as long as it lives."""
    _KNOWN.add(one)


def _forked() -> None:
    for one in list(_KNOWN):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
