"""What a running task can ask of the executor: its ``TaskContext``, as an interface.

Tasks are written and type-checked against these classes; the executor's child process implements them, and so may a
test. Nothing here does anything by itself.
"""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

from fieldlab_common.errors import ArtifactNameError, DefinitionError, FieldlabError
from fieldlab_common.events import Event, Member
from fieldlab_common.node import Node

__all__ = [
    "Artifact",
    "Clock",
    "CommandFailed",
    "EventLog",
    "ExperimentView",
    "Stopping",
    "TaskContext",
    "check_artifact_name",
    "check_parties",
]

MAX_ARTIFACT_NAME = 255


@dataclass(frozen=True)
class Artifact(os.PathLike[str]):
    """A file that a step produced and declared. On the node it is a path; ``name`` is how the client knows it."""

    name: str
    path: str

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, kw_only=True)
class Clock:
    """The node's clock against the director's: seconds to add to the node's, and the bound of the error."""

    offset: float = 0.0
    bound: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class ExperimentView:
    """The experiment as its tasks see it: its name, id, and all its deployments with role and addresses."""

    name: str
    id: str
    deployments: tuple[Member, ...] = ()


class CommandFailed(FieldlabError):
    """A command ended with a code that is not among its ``ok_codes``; ``output`` has the end of what it said."""

    code = "command_failed"

    def __init__(self, message: str, *, exit_code: int, output: str = "") -> None:
        super().__init__(message, details={"exit_code": exit_code})
        self.exit_code = exit_code
        self.output = output

    def __reduce__(self) -> tuple[Any, ...]:
        return _command_failed, (self.message, self.exit_code, self.output)


def _command_failed(message: str, exit_code: int, output: str) -> CommandFailed:
    return CommandFailed(message, exit_code=exit_code, output=output)


class Stopping(Protocol):
    """Set when the step is asked to stop."""

    def is_set(self) -> bool:
        """Whether it was asked."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is asked, or ``timeout`` seconds; whether it was."""
        ...


class EventLog(ABC):
    """The experiment's events, from a task: sent, awaited and read in the experiment's one order."""

    @abstractmethod
    def send(self, name: str, data: Any = None) -> None:
        """Send an event; ``data`` is JSON of at most 64 KiB.

        Raises:
            EventTooLarge: ``data`` is over the limit.
            DefinitionError: ``data`` is not JSON, or ``name`` is reserved.
        """

    @abstractmethod
    def wait(
        self,
        name: str,
        *,
        count: int = 1,
        where: Callable[[Event], bool] | None = None,
        after: int = 0,
        timeout: float | None = None,
    ) -> list[Event]:
        """Wait for ``count`` events of that name (that ``where`` accepts), numbered above ``after``.

        Raises:
            WaitTimeout: fewer came within ``timeout`` seconds.
        """

    @abstractmethod
    def stream(self, *, after: int = 0, timeout: float | None = None) -> Iterator[Event]:
        """All events from number ``after`` on, then those to come; ends when none came for ``timeout`` seconds."""

    @abstractmethod
    def latest(self, name: str) -> Event | None:
        """The last event of that name so far."""

    @abstractmethod
    def count(self, name: str) -> int:
        """How many events of that name there are so far."""


class TaskContext(ABC):
    """What a task gets for the parameter that it annotates ``TaskContext``."""

    events: EventLog
    stopping: Stopping
    node: Node
    experiment: ExperimentView
    deployment: str
    step: str
    attempt: int
    iteration: int
    log: logging.Logger
    store: MutableMapping[str, Any]
    results: Mapping[str, Any]
    clock: Clock

    @abstractmethod
    def artifact(self, name: str) -> Artifact:
        """A path to write a file to; it is collected when the step ends, well or badly.

        Raises:
            ArtifactNameError: ``name`` is absolute, leaves the folder, or is not portable.
        """

    @abstractmethod
    def ready(self) -> None:
        """Say that this background step does its work now: the steps that run during it may start."""

    @abstractmethod
    def gate(self, name: str, *, after: int = 0, timeout: float | None = None) -> Event:
        """Wait for the event that opens a gate, as ``fl.wait_for`` does: one of that name, numbered above ``after``.

        In a step or a DAG that is repeated, each round's gate opens with the next such event.

        Raises:
            WaitTimeout: none came within ``timeout`` seconds.
        """

    @abstractmethod
    def barrier(self, name: str, parties: int | str = "all", timeout: float | None = None) -> None:
        """Wait until ``parties`` (a number, ``"all"`` deployments, or a role) have come to the barrier.

        In a step or a DAG that is repeated, each round has a barrier of its own.

        Raises:
            BarrierBroken: it can no longer fill; says who is missing.
            DefinitionError: ``parties`` is a number and there is no ``timeout``.
            WaitTimeout: it did not fill within ``timeout`` seconds.
        """


# Controls, what Windows takes for a separator or a drive, and the marks that make a name look like another.
_BAD = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]|^[A-Za-z]:")


def check_artifact_name(name: object) -> str:
    """Return ``name`` if it is a portable relative name (``out/trace.csv``).

    Raises:
        ArtifactNameError: it is absolute, has ``..``, a backslash, a control character (also one that turns the
            direction of writing), a drive or an empty part, or is longer than 255 characters.
    """
    if (
        not isinstance(name, str)
        or not name
        or len(name) > MAX_ARTIFACT_NAME
        or len(name.encode(errors="replace")) > 1024
    ):
        raise ArtifactNameError(_bad_name(name), advice=f"Give text of 1 to {MAX_ARTIFACT_NAME} characters.")
    parts = name.split("/")
    if _BAD.search(name) or any(p in ("", ".", "..") or p != p.strip() for p in parts):
        raise ArtifactNameError(
            _bad_name(name),
            advice="Use a relative name such as 'trace.csv' or 'out/trace.csv', without '..' or a leading '/'.",
        )
    return name


def _bad_name(name: object) -> str:
    shown = ascii(name)
    return f"{shown if len(shown) < 80 else shown[:77] + '...'} cannot be the name of an artifact."


def check_parties(parties: object, timeout: float | None) -> None:
    """Check what a barrier is asked to wait for.

    Any step of any deployment may be one of a *number* of parties, so nobody can tell that no more will come before
    every deployment has ended: such a barrier needs a deadline. Of ``"all"`` and a role it is known.

    Raises:
        DefinitionError: ``parties`` is neither a number from 1 nor text, or it is a number and ``timeout`` is None.
    """
    if isinstance(parties, bool) or not isinstance(parties, int | str) or (isinstance(parties, int) and parties < 1):
        raise DefinitionError(f"parties={parties!r}: it is a number from 1, 'all', or a role.")
    if isinstance(parties, int) and timeout is None:
        raise DefinitionError(
            f"A barrier of {parties} parties cannot tell that no more will come, and would wait for ever.",
            advice="Give timeout=, or name the parties: 'all', or a role.",
        )
