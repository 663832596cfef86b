"""Tasks for hosts that have nothing but Python: they are imported there, so this module needs nothing else."""

from __future__ import annotations

import socket
from pathlib import Path

import fieldlab as fl


@fl.task(timeout=60)
def greet(*, ctx: fl.TaskContext) -> str:
    """Say that it is there, wait for the word, and tell the host's name in every way there is."""
    ctx.events.send("here", ctx.node.name)
    ctx.events.wait("go", timeout=60)
    print("greetings from", socket.gethostname())
    Path(ctx.artifact("host.txt")).write_text(socket.gethostname())
    return socket.gethostname()


@fl.task
def first() -> str:
    """End well, at once."""
    return "done before"


@fl.task
def hang(*, ctx: fl.TaskContext) -> None:
    """Say that it is there, and stay."""
    ctx.events.send("hanging")
    ctx.events.wait("never", timeout=600)


@fl.task
def fail() -> None:
    """Fail, at once."""
    raise RuntimeError("no such luck")
