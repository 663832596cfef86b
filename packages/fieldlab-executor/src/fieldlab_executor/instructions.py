"""What the machine is told (stimuli) and what it asks for (effects): plain data, compared by equality.

The supervisor feeds ``Machine.handle`` with stimuli and performs the effects in the order in which they are returned.
Nothing here acts. Times are in seconds, all by one clock that the supervisor chooses; the machine reads none.

What the supervisor owes: every ``StartAttempt`` is answered by exactly one ``AttemptEnded`` with its key (also when the
process could not be started); every ``Evaluate`` by one ``Evaluated`` (with ``error`` when its deadline passed);
a timer fires once, not before its time. Answers that come too late, after a cancel, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from fieldlab_common.lifecycle import DeploymentState, Reason, StepState
from fieldlab_common.protocol import StepRecord, Usage, ValueRef

__all__ = [
    "AttemptBegan",
    "AttemptEnded",
    "AttemptReady",
    "AttemptWaits",
    "CancelRequested",
    "ClearTimer",
    "Effect",
    "Evaluate",
    "Evaluated",
    "Finish",
    "Input",
    "Key",
    "KillAttempt",
    "Measuring",
    "Outcome",
    "Refused",
    "Report",
    "SetTimer",
    "StartAttempt",
    "Stimulus",
    "StopAttempt",
    "Terminated",
    "TimerFired",
]


class Key(NamedTuple):
    """One attempt: the step, its attempt counted from 1, its iteration counted from 0 (None: it is not iterated).

    ``step`` is a path (``fieldlab_common.paths``), as it is in records.
    """

    step: str
    attempt: int = 1
    iteration: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How an attempt ended, as its process shows it. ``state`` is SUCCEEDED or FAILED.

    ``value`` is the reference for the client; ``handle`` is opaque: where the supervisor keeps the value on the node.
    """

    state: StepState
    reason: Reason | None = None
    message: str = ""
    error: str = ""
    value: ValueRef | None = None
    handle: Any = None
    usage: Usage | None = None
    started: float | None = None
    ended: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """What a step's arguments may take of another step.

    ``handles`` has its value's handle, or none if it has no value. ``many``: it is an iterated step, its value the list
    of all handles; a handle None stands for the value None: of an iteration that failed, or of a background step that
    was stopped and returned nothing. ``error`` is its error as text,
    ``status`` the name of its state.
    """

    handles: tuple[Any, ...] = ()
    many: bool = False
    error: str = ""
    status: str = ""


# --- stimuli ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptBegan:
    """The attempt has its process now; until then its time does not run. To be said of those that have a time limit."""

    key: Key


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptReady:
    """The attempt called ``ctx.ready()``."""

    key: Key


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptWaits:
    """An attempt in a shared worker waits for an event or a barrier (or no more): others may use a worker meanwhile."""

    key: Key
    waits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnded:
    """The attempt's process and everything that it left behind is gone."""

    key: Key
    outcome: Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class TimerFired:
    """The time of a ``SetTimer`` has come."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """The answer to an ``Evaluate``: a truth value, or a length; ``error`` says why there is none.

    With a length, ``items`` has a handle for each item of the list.
    """

    id: int
    value: bool | int | None = None
    error: str = ""
    items: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelRequested:
    """A person or a program asked for the deployment to stop."""

    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terminated:
    """The executor itself was told to stop (SIGTERM, walltime)."""

    message: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused:
    """The director refused a record of the step."""

    step: str
    message: str


Stimulus = (
    AttemptBegan
    | AttemptReady
    | AttemptWaits
    | AttemptEnded
    | TimerFired
    | Evaluated
    | CancelRequested
    | Terminated
    | Refused
)


# --- effects ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StartAttempt:
    """Run the step. ``inputs``: by name, every step that its arguments may refer to.

    A name that begins with ``^`` is one of the DAG around the step's own (``^^``: of the DAG around that), and ``^``
    alone the item that this DAG is mapped over. ``item``: the handle of the item that the step itself is mapped over.
    """

    key: Key
    inputs: Mapping[str, Input]
    item: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StopAttempt:
    """Set ``ctx.stopping``, and send ``signal`` to the attempt's processes unless it is None. May come again."""

    key: Key
    signal: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KillAttempt:
    """End every process of the attempt now."""

    key: Key


@dataclass(frozen=True, kw_only=True, slots=True)
class SetTimer:
    """Send ``TimerFired(name)`` at ``at``; a timer of that name that is set already is moved."""

    name: str
    at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ClearTimer:
    """Forget the timer."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Have a child run user code (or count), with a deadline; ``shared``: a warm worker.

    ``when``, ``until``: call blob ``code`` with the value; ``retry_if``: with ``text``, the error; ``length``: count
    the items of the list. The value is that of ``handle`` (``many``: ``handle`` is the tuple of an iterated step's
    handles, the value their list), followed along ``path``. ``step`` is the step that asks.
    """

    id: int
    kind: Literal["when", "until", "retry_if", "length"]
    step: str
    code: str | None = None
    handle: Any = None
    many: bool = False
    path: tuple[str | int, ...] = ()
    text: str = ""
    shared: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Append the record to the journal's control lane. ``handle``: the value of a step that is a DAG."""

    record: StepRecord
    handle: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """An attempt of a measured step runs now (or no more)."""

    active: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """Every step has ended, and so has the deployment. Evaluations that are still under way are of no use any more."""

    state: DeploymentState
    reason: Reason
    message: str = ""


Effect = StartAttempt | StopAttempt | KillAttempt | SetTimer | ClearTimer | Evaluate | Report | Measuring | Finish
