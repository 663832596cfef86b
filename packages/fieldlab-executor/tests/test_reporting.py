"""What an executor says on the wire, and when: live, quiet while something is measured, silent until the end.

The director is a stand-in that notes every request. Steps and test meet over named pipes, which are not on the wire.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import pytest
from fieldlab_common.environment import Resources
from fieldlab_common.lifecycle import DeploymentState, Reason

from .hub import CONTROL, CTX, Bench, Executor, Hub

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Launch = Callable[..., Executor]
QUIET_FOR = 1.5  # seconds: logs would have been sent several times
LINES = 200


class Meeting:
    """Two named pipes: a step says that it is there, and waits for the word to go on."""

    def __init__(self, folder: Path) -> None:
        self.there, self.go = str(folder / "there"), str(folder / "go")
        os.mkfifo(self.there)
        os.mkfifo(self.go)

    def wait(self) -> None:
        """In the test: until the step is there."""
        with open(self.there) as pipe:
            pipe.read()

    def let_go(self) -> None:
        """In the test: the step goes on."""
        with open(self.go, "w"):
            pass


def talks(ctx, there, go):
    for number in range(LINES):
        print("line", number)
    ctx.events.send("measured", 42)
    with open(ctx.artifact("trace"), "w") as file:
        file.write("all of it")
    with open(there, "w"):
        pass
    with open(go):
        pass


def burns(seconds):
    while time.process_time() < seconds:
        pass


@pytest.fixture
def meeting(tmp_path: Path) -> Meeting:
    return Meeting(tmp_path)


def talking(meeting: Meeting, **spec: object) -> Bench:
    bench = Bench()
    bench.step("talks", talks, CTX, meeting.there, meeting.go, **spec)
    return bench


def has_everything(hub: Hub) -> bool:
    return (
        len(hub.logs("talks").split("\n")) == LINES + 1
        and [event.data for event in hub.events if event.name == "measured"] == [42]
        and [hub.stored.get(artifact.sha256) for artifact in hub.bodies("artifact")] == [b"all of it"]
    )


def test_live_sends_while_it_goes_on(launch: Launch, meeting: Meeting) -> None:
    executor = launch(talking(meeting, measured=True), reporting="live")
    meeting.wait()
    hub = executor.hub
    hub.wait(lambda: len(hub.logs("talks").split("\n")) == LINES + 1, "the log")
    hub.event("measured")
    meeting.let_go()
    assert executor.wait() == 0
    assert has_everything(hub)


@pytest.mark.parametrize(
    ("reporting", "spec", "heartbeats"),
    [("quiet", {"measured": True}, 1), ("silent", {}, 0)],
)
def test_nothing_but_a_heartbeat_is_on_the_wire_while_it_is_measured_and_all_of_it_comes_then(
    launch: Launch, meeting: Meeting, reporting: str, spec: dict[str, bool], heartbeats: int
) -> None:
    executor = launch(talking(meeting, **spec), reporting=reporting)
    hub = executor.hub
    meeting.wait()
    # A poll that was open when the measurement began is taken back.
    hub.wait(lambda: len(hub.replies) + len(hub.recalled) == len(hub.requests), "an end of what was asked before")
    before, answers = len(hub.requests), len(hub.replies)
    hub.send("noise", "from another node")
    with pytest.raises(AssertionError, match="did not come"):
        hub.wait(lambda: len(hub.requests) > before + heartbeats, "anything", QUIET_FOR)
    assert set(hub.requests[before:]) <= {"poll"}
    assert set(hub.replies[answers:]) <= {"poll"}
    assert len(hub.replies) - answers <= heartbeats
    assert len(hub.recalled) <= 1
    assert hub.logs("talks") == ""
    meeting.let_go()
    assert executor.wait() == 0
    assert has_everything(hub)
    assert hub.ended.state is DeploymentState.SUCCEEDED


def test_quiet_sends_what_is_not_measured(launch: Launch, meeting: Meeting) -> None:
    executor = launch(talking(meeting), reporting="quiet")
    meeting.wait()
    executor.hub.event("measured")
    meeting.let_go()
    assert executor.wait() == 0


def test_the_end_says_what_control_and_the_executor_itself_cost(launch: Launch) -> None:
    bench = Bench()
    bench.step("burns", burns, 1.5)
    bench.step("prints", lambda: print("x" * 1_000_000))
    bench.step("waits", lambda ctx: ctx.events.wait("go", timeout=60) and None, CTX)
    executor = launch(bench)
    hub = executor.hub
    hub.wait(lambda: "prints" in {r.step for r in hub.bodies("step") if r.settled}, "the end of 'prints'")
    least = hub.control // 2
    hub.send("go")
    assert executor.wait() == 0
    ended = hub.ended
    assert least <= ended.control_bytes <= hub.control < 1_000_000
    assert 3 <= ended.requests <= len([one for one in hub.requests if one in CONTROL])
    burned = hub.settled("burns").usage
    assert burned is not None
    assert 0 < ended.cpu < 1.5 <= burned.cpu


def test_a_deployment_ends_with_its_walltime_and_keeps_what_it_had(launch: Launch) -> None:
    bench = Bench()
    bench.step("first", lambda: 41)
    bench.step("stays", lambda ctx: print("so far", flush=True) or ctx.stopping.wait(), CTX)
    executor = launch(bench, resources=Resources(walltime=3.0))
    assert executor.wait() == 0
    hub = executor.hub
    assert (hub.ended.state, hub.ended.reason) == (DeploymentState.FAILED, Reason.TERMINATED)
    assert "walltime of 3 s" in hub.ended.message
    assert hub.value("first") == 41
    assert hub.logs("stays") == "so far\n"
