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
    "LAUNCH_AHEAD",
    "NEVER",
    "SILENCE_SECONDS",
    "Abandon",
    "Begin",
    "ExperimentAction",
    "ExperimentStanding",
    "Look",
    "Move",
    "MoveExperiment",
    "after_silence",
    "begins_at",
    "decide_beginning",
    "decide_experiment",
    "experiment_outcome",
    "way_to",
]

LAUNCH_AHEAD = 30.0  # seconds before start_at at which executors are launched, so that they are there by then
START_MARGIN = 0.05  # seconds from the order to begin until the time that it names, beside two ways there and back
TELLING = 0.005  # seconds that it takes a director to tell one executor
MOST_MARGIN = 10.0
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
        if experiment.start_at is not None and now < experiment.start_at - LAUNCH_AHEAD:
            return Look(at=experiment.start_at - LAUNCH_AHEAD)
        return MoveExperiment(state=ExperimentState.RUNNING)
    return Look(at=NEVER)


def _prepared(experiment: ExperimentStanding) -> ExperimentAction:
    counts = experiment.deployments
    possible = sum(count for state, count in counts.items() if not state.terminal)
    if 0 < possible < _needed(counts, experiment.min_nodes):
        return _too_few(counts, experiment.min_nodes, "prepared")
    waiting = counts.get(DeploymentState.PENDING, 0) + counts.get(DeploymentState.PREPARING, 0)
    return Look(at=NEVER) if waiting or not possible else MoveExperiment(state=ExperimentState.READY)


def _needed(counts: Mapping[DeploymentState, int], min_nodes: int | None) -> int:
    total = sum(counts.values())
    return total - counts.get(DeploymentState.CANCELLED, 0) if min_nodes is None else min(min_nodes, total)


def _too_few(counts: Mapping[DeploymentState, int], min_nodes: int | None, what: str) -> Abandon:
    failed = counts.get(DeploymentState.FAILED, 0) + counts.get(DeploymentState.LOST, 0)
    wish = "all are" if min_nodes is None else f"at least {min_nodes} are"
    return Abandon(
        message=f"Not started: {failed} of {sum(counts.values())} deployments could not be {what}, and {wish} needed "
        "(min_nodes says how many)."
    )


# --- the beginning ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Order all executors to begin, at the time that ``begins_at`` gives."""


def decide_beginning(
    deployments: Mapping[tuple[DeploymentState, bool], int], min_nodes: int | None
) -> Begin | Abandon | None:
    """What follows for an experiment that was launched, and whose executors wait to begin together; None: they wait on.

    ``deployments`` counts them by state, and by whether their executor said that it could begin. Those that may still
    come are waited for; not those that are unreachable, if there are enough without them.
    """
    counts: dict[DeploymentState, int] = {}
    for (state, _), count in deployments.items():
        counts[state] = counts.get(state, 0) + count
    alive = sum(count for state, count in counts.items() if not state.terminal)
    well = counts.get(DeploymentState.SUCCEEDED, 0)  # an executor of an earlier release does not wait
    needed = _needed(counts, min_nodes)
    if alive and alive + well < needed:
        return _too_few(counts, min_nodes, "launched")
    coming = {state for (state, ready), count in deployments.items() if count and not ready and not state.terminal}
    ready = sum(count for (state, said), count in deployments.items() if said and not state.terminal)
    return Begin() if ready and ready + well >= needed and coming <= {DeploymentState.UNREACHABLE} else None


def begins_at(now: float, start_at: float | None, bound: float, executors: int = 0) -> float:
    """When all begin, by the director's clock: at the time that was asked for, or as soon as all can know of it.

    ``bound``: the largest uncertainty of an executor's clock, which is half of its shortest way there and back.
    ``executors``: how many a director has to tell, one after the other.
    """
    return max(start_at or 0.0, now + min(MOST_MARGIN, START_MARGIN + 4.0 * bound + TELLING * executors))


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
