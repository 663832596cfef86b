"""A timeline has every change of state in order, whatever clocks say, and makes a picture that nodes cannot drive."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

import fieldlab as fl
import pandas
import pytest
from fieldlab.gantt import MOST_LANES, lanes_of
from fieldlab.ledger import Ledger
from fieldlab.timeline import Row, Timeline, timeline_of
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.errors import UnsupportedError
from fieldlab_common.events import DEPLOYMENT, Event
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState

S, D, E = StepState, DeploymentState, ExperimentState
BEGAN = 1_000_000.0


def told(state: D, at: float, name: str = "pi-1", reason: str | None = None) -> Event:
    return Event(
        name=DEPLOYMENT, data={"deployment": name, "state": state.value, "reason": reason}, sent_at=BEGAN + at, number=1
    )


def made(*bodies: Any, events: tuple[Event, ...] = (), skew: float = 0.0, state: D = D.SUCCEEDED) -> Timeline:
    """The timeline of a run with one deployment; times of steps are by a clock that is ``skew`` ahead."""
    ledger = Ledger()
    for body in (p.Started(), *bodies):
        kind = next(k for k, cls in p.RECORDS.items() if cls is type(body))
        ledger.add("pi-1", p.Record(kind=kind, at=BEGAN + 2.0 + skew, body=wire.encode(body)))
    deployment = p.DeploymentInfo(name="pi-1", node="n", state=state, message="All is well.")
    info = p.ExperimentInfo(
        id="x",
        name="e",
        state=E.SUCCEEDED,
        created=BEGAN,
        started=BEGAN + 1,
        ended=BEGAN + 9,
        deployments=(deployment,),
    )
    return timeline_of(info, ledger, events)


def step(name: str, start: float, end: float, skew: float = 0.0, **fields: Any) -> p.StepRecord:
    times = {"started": BEGAN + start + skew, "ended": BEGAN + end + skew}
    return p.StepRecord(step=name, **{"state": S.SUCCEEDED, "settled": True, **times, **fields})


WHOLE = (told(D.PREPARING, 0.5), told(D.RUNNING, 2.0), told(D.SUCCEEDED, 8.5, reason="completed"))


def test_changes_of_run_deployments_and_steps_stand_in_order() -> None:
    line = made(step("a", 3, 4), step("b", 4, 8), events=WHOLE)
    assert [(row.at, row.deployment, row.step, row.state.value) for row in line] == [
        (0.0, None, None, "preparing"),
        (0.0, "pi-1", None, "pending"),
        (0.5, "pi-1", None, "preparing"),
        (1.0, None, None, "running"),
        (2.0, "pi-1", None, "running"),
        (3.0, "pi-1", "a", "running"),
        (4.0, "pi-1", "a", "succeeded"),
        (4.0, "pi-1", "b", "running"),
        (8.0, "pi-1", "b", "succeeded"),
        (8.5, "pi-1", None, "succeeded"),
        (9.0, None, None, "succeeded"),
    ]
    assert line[-2].message == "All is well."


def test_attempts_and_iterations_are_told_apart() -> None:
    line = made(
        step("a", 1, 2, settled=False, state=S.FAILED, reason=Reason.TIMEOUT, iteration=0),
        step("a", 2, 3, settled=False, attempt=2, iteration=0),
        step("a", 3, 5, settled=False, iteration=1),
        step("a", 1, 5, iterations=2),
    )
    bars = {lane.step: lane.bars for lane in lanes_of(line)}["a"]
    assert [bar.what for bar in bars] == [
        "pi-1/a: succeeded, 4.0 s",
        "pi-1/a[0]: failed (timeout), 1.0 s",
        "pi-1/a[0], attempt 2: succeeded, 1.0 s",
        "pi-1/a[1]: succeeded, 2.0 s",
    ]


def test_what_has_not_ended_has_a_bar_without_end() -> None:
    line = made(p.StepRecord(step="a", state=S.RUNNING, started=BEGAN + 3), events=WHOLE[:2], state=D.RUNNING)
    assert [(lane.step, lane.bars[-1].end) for lane in lanes_of(line)] == [(None, None), ("a", None)]
    assert "stroke-dasharray" in line.to_svg()


def test_a_node_that_believes_it_is_1970_is_set_right() -> None:
    skew = -BEGAN
    line = made(step("a", 3, 4, skew), events=WHOLE, skew=skew)
    (began, ended) = line.of(step="a")
    assert (began.at, ended.at) == (3.0, 4.0)
    assert began.clock == 3.0


def test_states_that_a_newer_director_tells_are_passed_over() -> None:
    odd = Event(name=DEPLOYMENT, data={"deployment": "pi-1", "state": "paused"}, sent_at=BEGAN)
    forged = Event(name=DEPLOYMENT, data={"deployment": "pi-1", "state": "lost"}, sent_at=BEGAN, sender="pi-2")
    nothing = Event(name=DEPLOYMENT, data=["x"], sent_at=BEGAN)
    assert [row.state for row in made(events=(odd, forged, nothing)).of("pi-1")] == [D.PENDING]


def test_a_timeline_is_a_frame() -> None:
    frame = pandas.DataFrame(made(step("a", 3, 4), events=WHOLE).rows())
    assert list(frame[frame["step"] == "a"]["state"]) == ["running", "succeeded"]


def test_what_a_node_wrote_cannot_leave_the_picture() -> None:
    line = Timeline([Row(0.0, "<script>", 'x"/><script>alert(1)</script>', S.RUNNING), Row(0.0, "\x1b", None, D.LOST)])
    root = ElementTree.fromstring(line.to_svg())
    assert {part.tag.rpartition("}")[2] for part in root.iter()} <= {"svg", "rect", "text", "title", "path", "g"}
    assert "<script" not in line._repr_html_()
    assert "\x1b" not in repr(line)


@pytest.mark.parametrize("times", [(1e300, -1e300), (0.0, 0.0), (-1e308, 1e308), (5.0, 1.0), (1e9, 1e9 + 1e-7)])
def test_times_that_make_no_sense_make_a_picture_all_the_same(times: tuple[float, float]) -> None:
    line = Timeline([Row(times[0], "d", "s", S.RUNNING), Row(times[1], "d", "s", S.SUCCEEDED)])
    ElementTree.fromstring(line.to_svg())
    assert "nan" not in line.to_svg()


def test_of_too_many_steps_the_deployments_are_drawn() -> None:
    rows = [Row(float(n), "pi-1", f"s{n}", S.RUNNING) for n in range(MOST_LANES + 1)]
    line = Timeline([Row(0.0, "pi-1", None, D.RUNNING), *rows])
    assert f"{MOST_LANES + 1} steps are not drawn" in line.to_svg()


def test_of_too_many_deployments_a_notebook_gets_a_table() -> None:
    line = Timeline([Row(0.0, f"d{n}", None, D.RUNNING) for n in range(MOST_LANES + 1)])
    with pytest.raises(UnsupportedError, match="Take a part of it"):
        line.to_svg()
    assert line._repr_html_().startswith("<table>")


def test_a_run_here_and_a_simulation_have_the_same_kind_of_timeline() -> None:
    @fl.task
    def work() -> int:
        return 1

    with fl.DAG("d") as dag:
        work() >> work()
    experiment = fl.Experiment("both").map(dag, [fl.Node.dummy("a"), fl.Node.dummy("b")])
    real = fl.run(experiment).timeline()
    played = fl.simulate(experiment).timeline
    for line in (real, played):
        assert {(row.deployment, row.step, row.state) for row in line.of("a", "work-2")} == {
            ("a", "work-2", S.RUNNING),
            ("a", "work-2", S.SUCCEEDED),
        }
        assert [lane.step for lane in lanes_of(line)] == [None, "work", "work-2"] * 2
    assert list(real) == sorted(real, key=lambda row: row.at)
