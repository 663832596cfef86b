"""All executors of a run begin together: one that is to wait says when it could, and begins when it is told to."""

import time
from collections.abc import Callable

import pytest
from fieldlab_common.events import START
from fieldlab_common.lifecycle import DeploymentState
from fieldlab_common.protocol import Lane

from .hub import Bench, Executor, Hub

Launch = Callable[..., Executor]


def ready(hub: Hub) -> None:
    hub.wait(lambda: hub.bodies("ready"), "that it is ready")


def one_step() -> Bench:
    bench = Bench()
    bench.step("work", lambda: 1)
    return bench


def begun(hub: Hub) -> float:
    """When its first step began, by the executor's clock."""
    return next(record.at for record in hub.records[Lane.CONTROL] if record.kind == "step")


def test_it_is_ready_first_and_begins_nothing_before_it_is_told_to(launch: Launch) -> None:
    executor = launch(one_step(), start_at=None)
    ready(executor.hub)
    executor.hub.send("something else")
    assert [record.kind for record in executor.hub.records[Lane.CONTROL]] == ["ready"]
    executor.hub.send(START, {"at": time.time()})
    assert executor.wait() == 0
    kinds = [record.kind for record in executor.hub.records[Lane.CONTROL]]
    assert kinds[:3] == ["ready", "started", "step"]
    assert executor.hub.value("work") == 1


@pytest.mark.parametrize("ahead", [-86_400.0, 0.0, 86_400.0])
def test_it_begins_at_the_time_of_the_order_by_the_directors_clock(launch: Launch, ahead: float) -> None:
    executor = launch(one_step(), start_at=None, ahead=ahead)
    ready(executor.hub)
    at = time.time() + 1.0
    executor.hub.send(START, {"at": at + ahead})
    assert executor.wait() == 0
    (said,) = executor.hub.bodies("ready")
    assert at - said.bound <= begun(executor.hub) < at + 60


def test_a_time_that_stands_in_the_claim_needs_no_order(launch: Launch) -> None:
    at = time.time() + 2.0
    executor = launch(one_step(), start_at=at)
    assert executor.wait() == 0
    assert executor.hub.bodies("ready") == []
    assert begun(executor.hub) >= at - 0.5


def test_an_order_that_comes_before_all_is_fetched_is_not_missed(launch: Launch) -> None:
    hub = Hub(one_step(), start_at=None)
    hub.send(START, {"at": 0.0})
    executor = launch(one_step(), hub=hub)
    assert executor.wait() == 0
    assert hub.ended.state is DeploymentState.SUCCEEDED


def test_a_cancel_ends_one_that_waits(launch: Launch) -> None:
    executor = launch(one_step(), start_at=None)
    ready(executor.hub)
    executor.hub.cancel("not today")
    executor.wait()
    assert (executor.hub.ended.state, executor.hub.ended.message) == (DeploymentState.CANCELLED, "not today")
    assert executor.hub.bodies("started") == []


def test_one_that_is_silent_is_told_to_begin_all_the_same(launch: Launch) -> None:
    executor = launch(one_step(), start_at=None, reporting="silent")
    ready(executor.hub)
    executor.hub.send(START, {"at": 0.0})
    assert executor.wait() == 0
    assert executor.hub.ended.state is DeploymentState.SUCCEEDED
