"""The course of an experiment: when it may start, when silence counts, and what it ends as.

Functions of how things stand, without a clock and without effects. The director, a run here (``fl.run``) and a
simulation all ask here, so that an experiment that waits for its nodes does so by one rule wherever it is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fieldlab_common.lifecycle import TRANSITIONS, DeploymentState, ExperimentState, Reason

__all__ = [
    "CLAIM_SECONDS",
    "LAUNCHES",
    "NEVER",
    "SILENCE_SECONDS",
    "Abandon",
    "ExperimentAction",
    "ExperimentStanding",
    "Look",
    "Move",
    "MoveExperiment",
    "after_silence",
    "decide_experiment",
    "experiment_outcome",
    "way_to",
]

NEVER = 1e11  # a time to look again that does not come (the year 5138): only a change brings it back
SILENCE_SECONDS = 45.0  # an executor that was not heard of for so long is unreachable
CLAIM_SECONDS = 60.0  # a launched executor claims its deployment within
LAUNCHES = 3  # times that an executor is launched before the launch has failed


@dataclass(frozen=True, kw_only=True)
class Move:
    """Set a deployment's state."""

    state: DeploymentState
    reason: Reason | None = None
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Look:
    """Nothing to do before the time ``at``, unless something changes."""

    at: float


# --- deployments ------------------------------------------------------------------------------------------------------


def after_silence(
    state: DeploymentState, silent: float, *, lost_after: float, patience: float = SILENCE_SECONDS
) -> Move | None:
    """What ``silent`` seconds without a word mean for a deployment that runs; None: nothing new.

    First it is unreachable, and then lost: ask again after the move.
    """
    if silent >= lost_after and state is DeploymentState.UNREACHABLE:
        message = f"Nothing was heard of its executor for {silent:.0f} s (lost_after is {lost_after:.0f} s)."
        return Move(state=DeploymentState.LOST, reason=Reason.SILENT, message=message)
    if silent >= min(patience, lost_after) and state is DeploymentState.RUNNING:
        message = f"Nothing was heard of its executor for {silent:.0f} s; it may well go on."
        return Move(state=DeploymentState.UNREACHABLE, reason=Reason.SILENT, message=message)
    return None


# --- experiments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ExperimentStanding:
    """How an experiment stands; ``deployments`` counts them by state, ``start_at`` is by the clock of ``now``."""

    state: ExperimentState
    deployments: Mapping[DeploymentState, int]
    min_nodes: int | None = None
    start_requested: bool = False
    start_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class MoveExperiment:
    """Set the experiment's state."""

    state: ExperimentState


@dataclass(frozen=True, kw_only=True)
class Abandon:
    """Too few deployments can be prepared: cancel those that have not started, for the reason ``message``."""

    message: str


ExperimentAction = MoveExperiment | Abandon | Look


def decide_experiment(experiment: ExperimentStanding, now: float) -> ExperimentAction:
    """The next thing to do for an experiment on its way to running."""
    if experiment.state is ExperimentState.PREPARING:
        return _prepared(experiment)
    if experiment.state is ExperimentState.READY and experiment.start_requested:
        if experiment.start_at is not None and now < experiment.start_at:
            return Look(at=experiment.start_at)
        return MoveExperiment(state=ExperimentState.RUNNING)
    return Look(at=NEVER)


def _prepared(experiment: ExperimentStanding) -> ExperimentAction:
    counts = experiment.deployments
    total = sum(counts.values())
    possible = sum(count for state, count in counts.items() if not state.terminal)
    wanted = total - counts.get(DeploymentState.CANCELLED, 0)
    needed = wanted if experiment.min_nodes is None else min(experiment.min_nodes, total)
    if 0 < possible < needed:
        wish = "all are" if experiment.min_nodes is None else f"at least {experiment.min_nodes} are"
        return Abandon(
            message=f"Not started: {counts.get(DeploymentState.FAILED, 0)} of {total} deployments could not be "
            f"prepared, and {wish} needed (min_nodes says how many)."
        )
    waiting = counts.get(DeploymentState.PENDING, 0) + counts.get(DeploymentState.PREPARING, 0)
    return Look(at=NEVER) if waiting or not possible else MoveExperiment(state=ExperimentState.READY)


def experiment_outcome(states: Iterable[DeploymentState], cancelling: bool) -> ExperimentState | None:
    """What an experiment ends as when its deployments stand like that; None while one of them has not ended."""
    found = set(states)
    if not all(state.terminal for state in found):
        return None
    if cancelling:
        return ExperimentState.CANCELLED
    return ExperimentState.SUCCEEDED if found == {DeploymentState.SUCCEEDED} else ExperimentState.FAILED


def way_to(begin: ExperimentState, end: ExperimentState) -> list[ExperimentState]:
    """The shortest way that the tables have from ``begin`` to ``end``.

    An experiment that is only ready can lose its last deployment too.
    """
    ways: list[list[ExperimentState]] = [[begin]]
    while ways and ways[0][-1] is not end:
        way = ways.pop(0)
        ways += [[*way, state] for state in ExperimentState if state in TRANSITIONS[ExperimentState][way[-1]]]
    return ways[0][1:] if ways else []
