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
        (experiment(E.READY, ready=1, start_requested=True, start_at=NOW + 99), c.Look(at=NOW + 69)),
        (experiment(E.READY, ready=1, start_requested=True, start_at=NOW + 30), c.MoveExperiment(state=E.RUNNING)),
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


R, L, U, X, F = D.RUNNING, D.LAUNCHING, D.UNREACHABLE, D.CANCELLED, D.FAILED


@pytest.mark.parametrize(
    ("deployments", "min_nodes", "expected"),
    [
        ({(R, True): 3}, None, c.Begin()),
        ({(R, True): 2, (R, False): 1}, None, None),  # one fetches its blobs still
        ({(R, True): 2, (L, False): 1}, None, None),
        ({(R, True): 2, (L, False): 1}, 2, None),  # who may still come is waited for, though they are enough
        ({(R, True): 2, (U, False): 1}, None, None),
        ({(R, True): 2, (U, False): 1}, 2, c.Begin()),  # who cannot be reached is not, if they are
        ({(R, True): 2, (U, True): 1}, None, c.Begin()),
        ({(R, True): 2, (F, False): 1}, 2, c.Begin()),
        ({(R, True): 2, (X, True): 1}, None, c.Begin()),  # nobody wants the cancelled one any more
        ({(R, True): 1, (D.SUCCEEDED, True): 1}, None, c.Begin()),  # one that knows of no order began by itself
        ({(U, False): 2, (F, False): 1}, 1, None),
        ({(X, False): 2}, None, None),
    ],
)
def test_all_begin_when_none_is_waited_for(
    deployments: dict[tuple[D, bool], int], min_nodes: int | None, expected: c.Begin | None
) -> None:
    assert c.decide_beginning(deployments, min_nodes) == expected


@pytest.mark.parametrize("min_nodes", [None, 3])
def test_a_launch_that_failed_before_all_began_ends_those_that_need_it(min_nodes: int | None) -> None:
    action = c.decide_beginning({(R, True): 2, (F, False): 1}, min_nodes)
    assert isinstance(action, c.Abandon)
    assert "1 of 3 deployments could not be launched" in action.message


def test_all_begin_at_the_time_that_was_asked_for_or_when_the_slowest_can_know() -> None:
    assert c.begins_at(NOW, NOW + 20, 0.01) == NOW + 20
    assert c.begins_at(NOW, NOW - 20, 0.01) == NOW + 0.09
    assert c.begins_at(NOW, None, 0.01, executors=100) == NOW + 0.09 + 100 * c.TELLING
    assert c.begins_at(NOW, None, 1e9) == NOW + c.MOST_MARGIN
