"""What is decided, as tables: what is stored and seen, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fieldlab_common.lifecycle import DeploymentState as D
from fieldlab_common.lifecycle import Reason, advance
from fieldlab_common.protocol import Ended
from fieldlab_director import decide as d
from hypothesis import given
from hypothesis import strategies as st

NOW = 1000.0
WELL = Ended(state=D.SUCCEEDED, reason=Reason.COMPLETED)


def failed(job: d.Job, *, transient: bool = True) -> d.Seen:
    return d.Seen(failure=d.Failure(job=job, message="no route", transient=transient))


GONE = d.Seen(gone=True, tail="Traceback: boom")
NOTHING = d.Seen()


@pytest.mark.parametrize(
    ("row", "seen", "expected"),
    [
        ({"state": D.PENDING}, NOTHING, d.Move(state=D.PREPARING)),
        ({"state": D.PREPARING}, NOTHING, d.Do(job=d.Job.PREPARE)),
        ({"state": D.PREPARING, "prepared": True}, NOTHING, d.Move(state=D.READY)),
        ({"state": D.PREPARING, "attempts": 1}, failed(d.Job.PREPARE), d.Look(at=NOW + 0.75)),
        ({"state": D.PREPARING, "attempts": 3}, failed(d.Job.PREPARE), d.Look(at=NOW + 3.0)),
        ({"state": D.READY}, NOTHING, d.Look(at=NOW + 3600)),
        ({"state": D.READY, "go": True}, NOTHING, d.Move(state=D.LAUNCHING)),
        ({"state": D.LAUNCHING, "epoch": 1}, NOTHING, d.Do(job=d.Job.LAUNCH)),
        ({"state": D.LAUNCHING, "epoch": 1, "attempts": 1}, failed(d.Job.LAUNCH), d.Look(at=NOW + 0.75)),
        ({"state": D.LAUNCHING, "epoch": 1, "launched": 990.0}, NOTHING, d.Look(at=1045.0)),
        ({"state": D.LAUNCHING, "epoch": 1, "launched": 950.0}, NOTHING, d.Look(at=1010.0)),
        ({"state": D.LAUNCHING, "epoch": 1, "launched": 990.0}, GONE, d.Relaunch()),
        ({"state": D.LAUNCHING, "epoch": 1, "launched": 900.0}, NOTHING, d.Do(job=d.Job.STOP)),
        ({"state": D.LAUNCHING, "epoch": 1, "launched": 900.0}, d.Seen(queued="Priority"), d.Look(at=NOW + 45)),
        ({"state": D.LAUNCHING, "epoch": 1, "launched": 900.0}, d.Seen(served=20.0), d.Look(at=1040.0)),
        ({"state": D.LAUNCHING, "epoch": 2, "launched": 900.0}, GONE, d.Relaunch()),
        ({"state": D.LAUNCHING, "epoch": 2, "launched": 900.0}, failed(d.Job.STOP), d.Relaunch()),
        ({"state": D.RUNNING}, NOTHING, d.Look(at=NOW + 45)),
        ({"state": D.RUNNING}, d.Seen(silent=40), d.Look(at=NOW + 5)),
        ({"state": D.RUNNING, "lost_after": 10.0}, d.Seen(silent=4), d.Look(at=NOW + 6)),
        ({"state": D.UNREACHABLE}, d.Seen(silent=100), d.Look(at=NOW + 45)),
        ({"state": D.UNREACHABLE, "lost_after": 110.0}, d.Seen(silent=100), d.Look(at=NOW + 10)),
        ({"state": D.RUNNING}, GONE, d.Do(job=d.Job.DRAIN)),
        ({"state": D.UNREACHABLE}, GONE, d.Do(job=d.Job.DRAIN)),
        ({"state": D.RUNNING, "ending": WELL, "awaited": True}, NOTHING, d.Look(at=NOW + 45)),
        ({"state": D.RUNNING, "ending": WELL, "awaited": True}, GONE, d.Do(job=d.Job.DRAIN)),
        ({"state": D.SUCCEEDED}, NOTHING, d.Look(at=d.NEVER)),
        ({"state": D.CANCELLED, "present": True}, NOTHING, d.Do(job=d.Job.CLEAN_UP)),
        ({"state": D.SUCCEEDED, "present": True, "claimed": True}, NOTHING, d.Look(at=NOW + 300)),
        ({"state": D.SUCCEEDED, "present": True, "claimed": True}, GONE, d.Do(job=d.Job.DRAIN)),
        ({"state": D.SUCCEEDED, "present": True, "claimed": True, "drained": True}, NOTHING, d.Do(job=d.Job.CLEAN_UP)),
        ({"state": D.LOST, "present": True, "claimed": True, "since": -7e5}, NOTHING, d.Do(job=d.Job.CLEAN_UP)),
        ({"state": D.FAILED, "present": True, "attempts": 30}, failed(d.Job.CLEAN_UP), d.Look(at=NOW + 2700)),
    ],
)
def test_what_follows(row: dict[str, Any], seen: d.Seen, expected: d.Action) -> None:
    assert d.decide(d.Standing(**row), seen, NOW) == expected


@pytest.mark.parametrize(
    ("row", "seen", "state", "reason"),
    [
        ({"state": D.PREPARING}, failed(d.Job.PREPARE, transient=False), D.FAILED, Reason.PREPARE_FAILED),
        ({"state": D.PREPARING, "attempts": 6}, failed(d.Job.PREPARE), D.FAILED, Reason.PREPARE_FAILED),
        ({"state": D.LAUNCHING}, failed(d.Job.LAUNCH, transient=False), D.FAILED, Reason.LAUNCH_FAILED),
        ({"state": D.LAUNCHING, "epoch": 3, "launched": 990.0}, GONE, D.FAILED, Reason.LAUNCH_FAILED),
        ({"state": D.RUNNING}, d.Seen(silent=45), D.UNREACHABLE, Reason.SILENT),
        ({"state": D.UNREACHABLE, "lost_after": 60.0}, d.Seen(silent=60), D.LOST, Reason.SILENT),
        ({"state": D.RUNNING, "drained": True}, GONE, D.FAILED, Reason.EXECUTOR_LOST),
        ({"state": D.RUNNING, "attempts": 3}, replace(failed(d.Job.DRAIN), gone=True), D.FAILED, Reason.EXECUTOR_LOST),
        ({"state": D.RUNNING, "ending": WELL}, GONE, D.SUCCEEDED, Reason.COMPLETED),
        ({"state": D.RUNNING, "ending": WELL, "awaited": True, "drained": True}, GONE, D.SUCCEEDED, Reason.COMPLETED),
    ],
)
def test_how_it_moves(row: dict[str, Any], seen: d.Seen, state: D, reason: Reason) -> None:
    action = d.decide(d.Standing(**row), seen, NOW)

    assert isinstance(action, d.Move)
    assert (action.state, action.reason) == (state, reason)


@pytest.mark.parametrize("state", [D.PENDING, D.PREPARING, D.READY])
def test_what_was_not_launched_is_cancelled_at_once(state: D) -> None:
    row = d.Standing(state=state, cancelled=NOW, cancel_reason="wrong site", go=True)

    assert d.decide(row, NOTHING, NOW) == d.Move(state=D.CANCELLED, reason=Reason.CANCELLED, message="wrong site")


@pytest.mark.parametrize("launched", [None, 990.0])
def test_a_launch_is_cancelled_by_stopping_whatever_it_may_have_started(launched: float | None) -> None:
    row = d.Standing(state=D.LAUNCHING, epoch=1, launched=launched, cancelled=NOW)

    assert d.decide(row, NOTHING, NOW) == d.Do(job=d.Job.STOP)
    assert d.decide(row, GONE, NOW) == d.Move(state=D.CANCELLED, reason=Reason.CANCELLED)


def test_a_running_executor_may_cancel_by_itself_and_is_then_stopped_and_drained() -> None:
    row = d.Standing(state=D.RUNNING, cancelled=NOW)

    assert d.decide(row, NOTHING, NOW) == d.Look(at=NOW + 20)
    assert d.decide(row, NOTHING, NOW + 20) == d.Do(job=d.Job.STOP)
    assert d.decide(row, GONE, NOW + 21) == d.Do(job=d.Job.DRAIN)
    assert d.decide(replace(row, drained=True), GONE, NOW + 22) == d.Move(state=D.CANCELLED, reason=Reason.CANCELLED)


def test_a_cancel_gives_up_a_node_that_cannot_be_reached_and_says_so() -> None:
    row = d.Standing(state=D.UNREACHABLE, cancelled=NOW, attempts=2)

    assert d.decide(row, failed(d.Job.STOP), NOW + 299) == d.Look(at=NOW + 299 + 1.5)
    action = d.decide(row, failed(d.Job.STOP), NOW + 300)
    assert isinstance(action, d.Move)
    assert action.state is D.CANCELLED
    assert "not known: no route" in action.message


def test_a_launch_that_failed_shows_what_the_executor_said_last() -> None:
    action = d.decide(d.Standing(state=D.LAUNCHING, epoch=3, launched=990.0), GONE, NOW)

    assert isinstance(action, d.Move)
    assert "Traceback: boom" in action.message


@given(
    row=st.builds(
        d.Standing,
        state=st.sampled_from(D),
        since=st.floats(0, 1e9),
        epoch=st.integers(0, 4),
        launched=st.none() | st.floats(0, 1e9),
        attempts=st.integers(0, 50),
        cancelled=st.none() | st.floats(0, 1e9),
        cancel_reason=st.just(""),
        ending=st.none() | st.just(WELL),
        lost_after=st.floats(0.001, 1e6),
    ),
    seen=st.builds(
        d.Seen,
        gone=st.booleans(),
        silent=st.floats(0, 1e9),
        failure=st.none() | st.builds(d.Failure, job=st.sampled_from(d.Job), message=st.just("x")),
        tail=st.just(""),
    ),
    now=st.floats(0, 1e9),
    jitter=st.floats(0, 1),
)
def test_only_what_the_tables_have_is_decided_and_waiting_always_ends_later(
    row: d.Standing, seen: d.Seen, now: float, jitter: float
) -> None:
    action = d.decide(row, seen, now, jitter=jitter)

    if isinstance(action, d.Move):
        assert advance(row.state, action.state) is action.state
    elif isinstance(action, d.Look):
        assert action.at > now


def test_backoff_doubles_is_bounded_and_is_never_nothing() -> None:
    assert [d.backoff(n, 1.0) for n in (1, 2, 3, 20, 10_000)] == [1, 2, 4, 60, 60]
    assert d.backoff(1, 0.0) == 0.5
