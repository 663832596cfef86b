"""Results as flat rows, for pandas: one for each attempt of each step and iteration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fieldlab_common import paths
from fieldlab_common import protocol as p
from fieldlab_common.errors import BadAnswer, BlobMismatch, NotFound, UntrustedValue
from fieldlab_common.lifecycle import StepState

from fieldlab.ledger import Attempt

if TYPE_CHECKING:
    from fieldlab.results import StepResult

__all__ = ["rows_of", "took"]

_OPENED = (UntrustedValue, NotFound, BlobMismatch, BadAnswer)  # why a value that there is may not be had


def rows_of(step: StepResult, info: p.DeploymentInfo, values: bool) -> Iterator[dict[str, Any]]:
    """The rows of one step; ``values``: with what was returned."""
    base = {"deployment": step.deployment, "node": info.node, "role": info.role, "step": paths.plain(step.name)}
    around = paths.iteration_of(step.name)
    for one, last in _attempts(step):
        iteration = around if one.iteration is None else one.iteration
        yield {**base, "path": step.name, "iteration": iteration, **_row(step, one, values), "last": last}


def _attempts(step: StepResult) -> Iterator[tuple[Attempt, bool]]:
    """Every attempt, by iteration, and whether it is the one that counts; of what did not run, how it stands."""
    ledger = step.ledger
    settled = ledger.settled.attempt if ledger.settled is not None else None
    history = step.history
    for one in sorted(history, key=lambda one: (-1 if one.iteration is None else one.iteration, one.attempt)):
        counts = settled if one.iteration is None else ledger.iterations[one.iteration].attempt
        yield one, one.attempt == counts
    if not step.iterated and (None, settled) not in ledger.history:
        under_way = ledger.running and ledger.settled is None
        yield (
            Attempt(
                attempt=max((one.attempt for one in history), default=0) + 1 if under_way else 0,
                state=step.status,
                reason=step.reason,
                message=step.message,
                started=step.started if not history else None,
                ended=step.ended,
            ),
            True,
        )


def _row(step: StepResult, one: Attempt, values: bool) -> dict[str, Any]:
    value = None
    if values and one.state is StepState.SUCCEEDED:
        with contextlib.suppress(*_OPENED):  # the row still says what it is, in "summary"
            value = step.open_one(one.value, False)
    return {
        "attempt": one.attempt,
        "state": one.state.value,
        "reason": one.reason.value if one.reason is not None else None,
        "value": value,
        "summary": one.value.summary if one.value is not None else "",
        "started": one.started,
        "ended": one.ended,
        "seconds": took(one),
        "cpu": one.usage.cpu if one.usage is not None else None,
        "peak_memory": one.usage.peak_memory if one.usage is not None else None,
        "late": step.late,
        "message": one.message,
        "error": one.error,
    }


def took(one: StepResult | Attempt) -> float | None:
    """How long it took, in seconds, if it has ended."""
    return one.ended - one.started if one.ended is not None and one.started is not None else None
