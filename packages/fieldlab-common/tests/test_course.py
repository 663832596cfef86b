"""The course of an experiment, as tables: how it stands, and what follows."""

from __future__ import annotations

from typing import Any

import pytest
from fieldlab_common import course as c
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.lifecycle import ExperimentState as E

NOW = 1000.0


def experiment(state: E = E.PREPARING, **changes: Any) -> c.ExperimentStanding:
    counts = {D[name.upper()]: changes.pop(name) for name in list(changes) if name.upper() in D.__members__}
    return c.ExperimentStanding(state=state, deployments=counts, **changes)


@pytest.mark.parametrize(
    ("standing", "expected"),
    [
        (experiment(ready=2, preparing=1), c.Look(at=c.NEVER)),
        (experiment(ready=3), c.MoveExperiment(state=E.READY)),
        (experiment(ready=2, failed=1, min_nodes=2), c.MoveExperiment(state=E.READY)),
        (experiment(ready=1, pending=1, failed=1, min_nodes=2), c.Look(at=c.NEVER)),
        (experiment(ready=2, cancelled=1), c.MoveExperiment(state=E.READY)),
        (experiment(ready=1, min_nodes=9), c.MoveExperiment(state=E.READY)),
        (experiment(failed=2), c.Look(at=c.NEVER)),
        (experiment(E.READY, ready=1), c.Look(at=c.NEVER)),
        (experiment(E.READY, ready=1, start_requested=True), c.MoveExperiment(state=E.RUNNING)),
        (experiment(E.READY, ready=1, start_requested=True, start_at=NOW + 5), c.Look(at=NOW + 5)),
        (experiment(E.READY, ready=1, start_requested=True, start_at=NOW), c.MoveExperiment(state=E.RUNNING)),
        (experiment(E.RUNNING, running=1), c.Look(at=c.NEVER)),
    ],
)
def test_what_follows_for_an_experiment(standing: c.ExperimentStanding, expected: c.ExperimentAction) -> None:
    assert c.decide_experiment(standing, NOW) == expected


@pytest.mark.parametrize("standing", [experiment(ready=2, failed=1), experiment(pending=1, failed=2, min_nodes=2)])
def test_an_experiment_is_abandoned_as_soon_as_too_few_can_be_prepared(standing: c.ExperimentStanding) -> None:
    action = c.decide_experiment(standing, NOW)

    assert isinstance(action, c.Abandon)
    assert "min_nodes" in action.message


@pytest.mark.parametrize(
    ("states", "cancelling", "outcome"),
    [
        ([D.SUCCEEDED, D.RUNNING], False, None),
        ([D.SUCCEEDED, D.SUCCEEDED], False, E.SUCCEEDED),
        ([D.SUCCEEDED, D.LOST], False, E.FAILED),
        ([D.SUCCEEDED, D.CANCELLED], False, E.FAILED),
        ([D.SUCCEEDED, D.CANCELLED], True, E.CANCELLED),
        ([D.UNREACHABLE], True, None),
    ],
)
def test_what_an_experiment_ends_as(states: list[D], cancelling: bool, outcome: E | None) -> None:
    assert c.experiment_outcome(states, cancelling) is outcome


@pytest.mark.parametrize(
    ("state", "silent", "expected"),
    [
        (D.RUNNING, 44.9, None),
        (D.RUNNING, 45.0, D.UNREACHABLE),
        (D.RUNNING, 7000.0, D.UNREACHABLE),  # one after the other: first it is unreachable
        (D.UNREACHABLE, 7000.0, D.LOST),
        (D.UNREACHABLE, 600.0, None),
        (D.LAUNCHING, 7000.0, None),  # it has not been heard of yet
        (D.LOST, 9000.0, None),
    ],
)
def test_what_silence_means(state: D, silent: float, expected: D | None) -> None:
    move = c.after_silence(state, silent, lost_after=3600.0)
    assert (move.state if move else None) == expected


def test_a_deployment_may_be_lost_before_it_would_be_unreachable() -> None:
    first = c.after_silence(D.RUNNING, 10.0, lost_after=10.0)
    assert first is not None
    assert first.state is D.UNREACHABLE
    assert "10 s" in first.message


@pytest.mark.parametrize(
    ("begin", "end", "way"),
    [
        (E.RUNNING, E.SUCCEEDED, [E.SUCCEEDED]),
        (E.READY, E.FAILED, [E.RUNNING, E.FAILED]),
        (E.PREPARING, E.CANCELLED, [E.CANCELLING, E.CANCELLED]),
        (E.FAILED, E.SUCCEEDED, []),
    ],
)
def test_the_way_to_an_end(begin: E, end: E, way: list[E]) -> None:
    assert c.way_to(begin, end) == way
