"""What happened when: every change of state of a run, or of a simulation, as rows, as a table and as a picture.

Rows are changes, not spans, because that is what is known: a step whose end nobody heard of has a beginning all the
same. ``gantt`` makes spans of them. Times are in seconds from the start; in a simulation they are virtual.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.drawing import Svg
from fieldlab_common.errors import UnsupportedError
from fieldlab_common.events import DEPLOYMENT, Event
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState

from fieldlab.ledger import Attempt, Ledger, StepLedger
from fieldlab.text import counted, html_table, table

__all__ = ["Row", "Timeline", "timeline_of"]

SHOWN = 40  # rows of a table; the rest is counted
ASTRAY = 60.0  # seconds; a node's clock that is off by more is set right by when the node began


class Row(NamedTuple):
    """One change of state. ``at`` is in seconds from the start; ``clock`` is what the clock there showed.

    ``step`` is None for the deployment's own state, and ``deployment`` too for the experiment's. The clock of a step's
    changes is the node's, that of all others the director's; in seconds since the epoch, in a simulation virtual.
    """

    at: float
    deployment: str | None
    step: str | None
    state: StepState | DeploymentState | ExperimentState
    reason: Reason | None = None
    attempt: int = 1
    iteration: int | None = None
    message: str = ""
    clock: float = 0.0


class Timeline(tuple[Row, ...]):
    """Every change of state, in the order of time. Printed, it is a table of the first and the last of them; in a
    notebook, a picture of what ran when.
    """

    __slots__ = ()

    def of(self, deployment: str | None = None, step: str | None = None) -> Timeline:
        """Those of a deployment, of a step (with those inside of it), or of both."""
        return Timeline(
            row
            for row in self
            if (deployment is None or row.deployment == deployment)
            and (step is None or (row.step is not None and paths.below(row.step, step)))
        )

    def rows(self) -> list[dict[str, Any]]:
        """A flat row for each change: for pandas. States and reasons are texts."""
        return [
            {**row._asdict(), "state": row.state.value, "reason": row.reason.value if row.reason else None}
            for row in self
        ]

    def to_svg(self) -> Svg:
        """A picture, as an SVG document: a line for each deployment and step, a bar for each attempt and iteration.

        Raises:
            UnsupportedError: there is so much that nobody could read it; take a part: ``.of("pi-1")``.
        """
        from fieldlab.gantt import gantt

        return gantt(self)

    def _cells(self) -> list[list[object]]:
        cut = len(self) - SHOWN
        if cut <= 0:
            return [_cells(row) for row in self]
        half = SHOWN // 2
        gap: list[object] = ["…", f"{cut} more", "", "", "", ""]
        return [*map(_cells, self[:half]), gap, *map(_cells, self[-half:])]

    def __repr__(self) -> str:
        return table(_HEADER, self._cells())

    def _repr_html_(self) -> str:
        try:
            return self.to_svg()._repr_html_()
        except UnsupportedError:
            return html_table(_HEADER, self._cells(), caption=counted(len(self), "change") + " of state")


_HEADER = ("at", "deployment", "step", "state", "reason", "message")


def _cells(row: Row) -> list[object]:
    step = row.step or ""
    if row.iteration is not None:
        step += f"[{row.iteration}]"
    if row.attempt > 1:
        step += f", attempt {row.attempt}"
    return [f"{row.at:.3f} s", row.deployment, step, row.state, row.reason, row.message]


# --- of a run ---------------------------------------------------------------------------------------------------------


def timeline_of(info: p.ExperimentInfo, ledger: Ledger, events: Iterable[Event]) -> Timeline:
    """The timeline of a run: its own times, the states of its deployments that the log tells, its steps' records.

    A node without a battery behind its clock may say that it is 1970: then ``at`` counts from when the director saw it
    begin, and ``clock`` is still what it said.
    """
    rows = [*_experiment(info), *_deployments(info, events)]
    began = {row.deployment: row.clock for row in reversed(rows) if row.state is DeploymentState.RUNNING}
    rows = [row._replace(at=row.clock - info.created) for row in rows]
    for name, deployment in list(ledger.deployments.items()):
        ahead = (deployment.began or 0.0) - began.get(name, 0.0) if deployment.began and name in began else 0.0
        origin = info.created + (ahead if abs(ahead) > ASTRAY else 0.0)
        for path, step in list(deployment.steps.items()):
            rows += (row._replace(at=row.clock - origin) for row in _step(name, path, step))
    return Timeline(sorted(rows, key=lambda row: row.at))


def _experiment(info: p.ExperimentInfo) -> Iterator[Row]:
    times = (
        (info.created, ExperimentState.PREPARING),
        (info.started, ExperimentState.RUNNING),
        (info.ended, info.state),
    )
    for clock, state in times:
        if clock is not None:
            message = info.message if state.terminal else ""
            yield Row(0.0, None, None, state, message=message, clock=clock)


def _deployments(info: p.ExperimentInfo, events: Iterable[Event]) -> Iterator[Row]:
    messages = {one.name: one.message for one in info.deployments if one.state.terminal}
    for one in info.deployments:
        yield Row(0.0, one.name, None, DeploymentState.PENDING, clock=info.created)
    for event in events:
        change = event.data if event.name == DEPLOYMENT and event.sender is None else None
        if isinstance(change, dict) and str(change.get("state")) in _STATES:
            state, reason = DeploymentState(change["state"]), str(change.get("reason"))
            yield Row(
                0.0,
                name := str(change.get("deployment")),
                None,
                state,
                Reason(reason) if reason in _REASONS else None,
                message=messages.get(name, "") if state.terminal else "",
                clock=event.sent_at,
            )


# A director that is newer may know more.
_STATES = frozenset(state.value for state in DeploymentState)
_REASONS = frozenset(reason.value for reason in Reason)


def _step(deployment: str, path: str, step: StepLedger) -> Iterator[Row]:
    settled = step.settled
    for one in list(step.history.values()):
        yield from _attempt(deployment, path, one)
    if step.running and settled is None and step.started is not None:
        latest = max((one.ended or 0.0 for one in step.history.values()), default=step.started)
        yield Row(0.0, deployment, path, StepState.RUNNING, attempt=step.attempt, clock=latest)
    if settled is not None and (None, settled.attempt) not in step.history and settled.ended is not None:
        if settled.started is not None:
            yield Row(0.0, deployment, path, StepState.RUNNING, clock=settled.started)
        yield Row(0.0, deployment, path, settled.state, settled.reason, message=settled.message, clock=settled.ended)


def _attempt(deployment: str, path: str, one: Attempt) -> Iterator[Row]:
    blank = Row(0.0, deployment, path, StepState.RUNNING, attempt=one.attempt, iteration=one.iteration)
    if one.started is not None:
        yield blank._replace(clock=one.started)
    if one.ended is not None:
        yield blank._replace(state=one.state, reason=one.reason, message=one.message, clock=one.ended)
