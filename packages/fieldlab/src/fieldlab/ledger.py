"""The fold: records of the control lane, put together by deployment, then step.

The same fold serves runs at a director and runs here. It is a function of the records alone: in whatever pages they
come, and read however often, they give the same. A late record fills a gap and never changes what is settled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.errors import InvalidMessage
from fieldlab_common.lifecycle import Reason, StepState
from fieldlab_common.wire import decode

__all__ = ["Attempt", "DeploymentLedger", "Ledger", "StepLedger"]


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt of a step (or of one of its iterations), as the node recorded it. Times: seconds since the epoch."""

    attempt: int = 1
    iteration: int | None = None
    state: StepState = StepState.RUNNING
    reason: Reason | None = None
    message: str = ""
    error: str = ""
    started: float | None = None
    ended: float | None = None
    usage: p.Usage | None = None
    value: p.ValueRef | None = field(default=None, repr=False)


def _attempt(record: p.StepRecord) -> Attempt:
    return Attempt(
        attempt=record.attempt,
        iteration=record.iteration,
        state=record.state,
        reason=record.reason,
        message=record.message,
        error=record.error,
        started=record.started,
        ended=record.ended,
        usage=record.usage,
        value=record.value,
    )


# --- the fold ---------------------------------------------------------------------------------------------------------


@dataclass
class StepLedger:
    """What is known of one step."""

    running: bool = False
    settled: p.StepRecord | None = None
    late: bool = False
    attempt: int = 0
    started: float | None = None
    history: dict[tuple[int | None, int], Attempt] = field(default_factory=dict)
    iterations: dict[int, Attempt] = field(default_factory=dict)
    artifacts: dict[str, p.ArtifactRecord] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)

    def add(self, record: p.StepRecord, late: bool) -> None:
        """Take in one record."""
        if self.settled is not None:
            return
        self.attempt = max(self.attempt, record.attempt)
        if self.started is None:
            self.started = record.started
        if record.settled:
            self.settled, self.late = record, late
            if record.iterations is None and record.started is not None:  # else it never ran
                self.history[None, record.attempt] = _attempt(record)
        elif record.state is StepState.RUNNING:
            self.running = True
        else:
            self.history[record.iteration, record.attempt] = _attempt(record)
            if record.iteration is not None:
                self.iterations[record.iteration] = _attempt(record)


@dataclass
class DeploymentLedger:
    """What is known of one deployment from its records. ``steps`` are by path (``fieldlab_common.paths``).

    ``inside``: by scope, the steps of which something is known. ``runs``: by the path of a step that is a DAG, its
    iterations (None: it is not iterated) and the last attempt of each. ``running``: the steps that run now.
    """

    steps: dict[str, StepLedger] = field(default_factory=dict)
    inside: dict[str, dict[str, None]] = field(default_factory=dict)
    runs: dict[str, dict[int | None, int]] = field(default_factory=dict)
    running: dict[str, None] = field(default_factory=dict)
    started: p.Started | None = None
    began: float | None = None  # when it started, by the node's clock
    ended: p.Ended | None = None
    cancel: p.CancelRecord | None = None

    def step(self, path: str) -> StepLedger:
        """The ledger of a step; made when it is first heard of."""
        if path not in self.steps:
            self.steps[path] = StepLedger()
            self._place(path)
        return self.steps[path]

    def _place(self, path: str) -> None:
        scope, name = paths.split(path)
        self.inside.setdefault(scope, {})[name] = None
        parts = paths.parts_of(scope)
        if parts:
            outer, iteration, attempt = parts[-1]
            runs = self.runs.setdefault(paths.join(paths.split(scope)[0], outer), {})
            runs[iteration] = max(attempt, runs.get(iteration, 1))

    def add(self, record: p.StepRecord, late: bool) -> None:
        """Take in one record of a step."""
        self.step(record.step).add(record, late)
        if record.settled:
            self.running.pop(record.step, None)
        elif record.state is StepState.RUNNING:
            self.running[record.step] = None


class Ledger:
    """The fold: give it every record once, in order. What this version does not know or cannot read is passed over."""

    def __init__(self) -> None:
        self.deployments: dict[str, DeploymentLedger] = {}

    def add(self, deployment: str, record: p.Record, *, late: bool = False) -> None:
        """Take in one record."""
        one = self.deployments.setdefault(deployment, DeploymentLedger())
        cls = p.RECORDS.get(record.kind)
        if cls is None:
            return
        try:
            body: Any = decode(cls, dict(record.body))
        except InvalidMessage:  # of a node that is newer, or broken: the others' results are none the worse for it
            return
        if isinstance(body, p.StepRecord):
            one.add(body, late)
        elif isinstance(body, p.ArtifactRecord):
            if not body.value:
                one.step(body.step).artifacts[_artifact_key(body)] = body
        elif isinstance(body, p.ArtifactLost):
            one.step(body.step).lost[body.sha256 or body.name] = body.reason
        elif isinstance(body, p.Started):
            one.started, one.began = body, record.at
        elif isinstance(body, p.Ended) and one.ended is None:
            one.ended = body
        elif isinstance(body, p.CancelRecord):
            one.cancel = body


def _artifact_key(record: p.ArtifactRecord) -> str:
    return f"{record.iteration}/{record.attempt}/{record.name}"
