"""What an executor reports: the records of its journal, in two lanes.

A record is the JSON of ``Record`` in a frame (``wire.frame``); its ``body`` has the fields of the class that
``RECORDS`` names for its ``kind``. The director keeps a kind that it does not know; the client folds the control
lane into results. Values stand in records as ``ValueRef``: as data, or by the digest of an artifact when large.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fieldlab_common.lifecycle import DeploymentState, Reason, StepState

__all__ = [
    "CONTROL_KINDS",
    "INLINE_VALUE_BYTES",
    "RECORDS",
    "ArtifactLost",
    "ArtifactRecord",
    "CancelRecord",
    "Ended",
    "EventRecord",
    "GapRecord",
    "Lane",
    "LogRecord",
    "Ready",
    "Record",
    "Started",
    "StepRecord",
    "Usage",
    "ValueRef",
]

INLINE_VALUE_BYTES = 256 * 1024  # a value whose JSON is longer travels as an artifact


class Lane(StrEnum):
    """The two ways of a journal to the director; each has its own numbers, files, acknowledgements and connection."""

    CONTROL = "control"  # step states, events, results, artifact announcements: never dropped
    BULK = "bulk"  # log chunks: dropped oldest-first, with a gap record, when the spool is full


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One entry of a journal, as JSON in its frame. ``at``: seconds since the epoch, by the node's clock."""

    kind: str
    at: float
    body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The executor has its deployment and everything it takes, and waits for the order to begin.

    ``bound``: how far, in seconds, its estimate of the director's clock may be wrong.
    """

    bound: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Started:
    """The executor has its deployment and everything it takes, and begins."""

    python: str = ""
    pid: int = 0
    hostname: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What an attempt used: CPU time in seconds, peak resident memory in bytes, exit code or signal of its process."""

    cpu: float = 0.0
    peak_memory: int = 0
    exit_code: int | None = None
    signal: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueRef:
    """A step's value for the client: ``json`` or ``parts`` (safe) or ``pickle`` (opens only on trust).

    Inline, ``json`` has the tagged document of ``payload``, and ``data`` one with parts, or a pickle, in base64. A
    larger value is the artifact with ``sha256``. ``summary`` tells people what it is without opening it.

    The value of a step that is a DAG refers to steps inside of it: ``step``, whose path ``json`` is, or ``steps``: a
    dict of the values of several, by name, for which ``json`` has their paths (None: it has no value).
    """

    format: str = "json"
    json: Any = None
    data: str = ""
    sha256: str | None = None
    size: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """A step's state changed, or one of its attempts ended.

    ``settled``: this is the step's own terminal state. A failed attempt that will be tried again, and each iteration
    of a repeated or mapped step, is a record with ``settled`` false and its own ``attempt`` and ``iteration``. The
    value of an iterated step is the list of its iterations' values, and is not repeated in the settled record
    (``iterations`` says how many there are). ``error`` is the traceback as text; ``message`` one sentence.
    """

    step: str
    state: StepState
    settled: bool = False
    attempt: int = 1
    iteration: int | None = None
    iterations: int | None = None
    reason: Reason | None = None
    message: str = ""
    error: str = ""
    started: float | None = None
    ended: float | None = None
    value: ValueRef | None = None
    usage: Usage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EventRecord:
    """A task sent an event."""

    name: str
    data: Any = None
    step: str | None = None
    iteration: int = 0


@dataclass(frozen=True, kw_only=True)
class ArtifactRecord:
    """A file that a step produced is on its way; its bytes are the blob ``sha256``. ``value``: a spilled value."""

    step: str
    name: str
    size: int
    sha256: str
    attempt: int = 1
    iteration: int | None = None
    value: bool = False


@dataclass(frozen=True, kw_only=True)
class ArtifactLost:
    """An announced or declared file will not come, for ``reason``."""

    step: str
    name: str
    reason: str
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class CancelRecord:
    """What a cancel did: how many processes were ended, and which could not be (``pid: command``)."""

    reason: str = ""
    killed: int = 0
    survivors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The last control record: how the deployment ended. ``bulk``: the number of the last bulk record (0: none).

    ``control_bytes``, ``requests`` and ``cpu`` are what the executor itself cost: bytes sent and received for control,
    number of requests, CPU seconds of supervisor and spawner.
    """

    state: DeploymentState
    reason: Reason
    message: str = ""
    bulk: int = 0
    control_bytes: int = 0
    requests: int = 0
    cpu: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LogRecord:
    """Output of a step. ``stream``: ``stdout``, ``stderr``, ``log`` (``ctx.log``) or ``executor`` (its own remarks)."""

    step: str
    text: str
    stream: str = "stdout"
    attempt: int = 1
    iteration: int | None = None


@dataclass(frozen=True, kw_only=True)
class GapRecord:
    """Bulk records ``first`` to ``last``, of ``bytes`` bytes, will not come: for ``reason``.

    Without a reason they were dropped on the node for want of space.
    """

    first: int
    last: int
    bytes: int = 0
    reason: str = ""


RECORDS: Mapping[str, type] = {
    "ready": Ready,
    "started": Started,
    "step": StepRecord,
    "event": EventRecord,
    "artifact": ArtifactRecord,
    "artifact_lost": ArtifactLost,
    "cancel": CancelRecord,
    "ended": Ended,
    "log": LogRecord,
    "gap": GapRecord,
}
CONTROL_KINDS = frozenset(RECORDS) - {"log", "gap"}
