"""Records fold into results: in whatever order pages come, results say what happened and run nothing when printed."""

from __future__ import annotations

import base64
from typing import Any

import pandas
import pytest
from fieldlab.ledger import DeploymentLedger, Ledger
from fieldlab.logs import Logs
from fieldlab.results import DeploymentResults, Reader, Results
from fieldlab_common import payload, wire
from fieldlab_common import protocol as p
from fieldlab_common.deployment import Graph, Need, StepSpec
from fieldlab_common.errors import BadAnswer, NotFound, ResultNotReady, StepFailed, UnknownNameError, UntrustedValue
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState

S, D = StepState, DeploymentState
GRAPH = Graph(
    name="probing",
    steps=(
        StepSpec(name="first", task="first", code="", args=""),
        StepSpec(name="second", task="second", code="", args="", needs=(Need(step="first"),)),
    ),
)


def record(body: Any, at: float = 1.0) -> p.Record:
    kind = next(k for k, cls in p.RECORDS.items() if cls is type(body))
    return p.Record(kind=kind, at=at, body=wire.encode(body))


def ref(value: Any) -> p.ValueRef:
    made = payload.encode_value(value)
    data = base64.b64encode(made.body).decode() if made.format == "pickle" else ""
    return p.ValueRef(format=made.format, json=made.json, data=data, size=made.size, summary=made.summary)


def fold(
    *bodies: Any,
    state: DeploymentState = D.RUNNING,
    late: bool = False,
    blobs: dict[str, bytes] | None = None,
    graph: str = "digest",
) -> Any:
    ledger = Ledger()
    for body in bodies:
        ledger.add("pi-1", record(body), late=late)
    info = p.DeploymentInfo(
        name="pi-1",
        node="raspi",
        state=state,
        reason=Reason.EXECUTOR_LOST if state.terminal else None,
        graph=graph,
    )
    experiment = p.ExperimentInfo(id="x", name="exp", state=ExperimentState.RUNNING, deployments=(info,))
    reader = Reader(
        blob=lambda digest, size: (blobs or {})[digest],
        graph={"digest": GRAPH}.__getitem__,
        logs=lambda d, s: Logs(),
        artifacts=lambda d, s: [],
    )
    return Results(experiment, ledger, lambda info: ("first", "second"), reader)


def done(step: str = "first", **fields: Any) -> p.StepRecord:
    given = {"state": S.SUCCEEDED, "settled": True, "reason": Reason.RETURNED, "started": 1.0, "ended": 3.0, **fields}
    return p.StepRecord(step=step, **given)


def test_a_step_that_succeeded_has_its_value_and_times() -> None:
    step = fold(p.StepRecord(step="first", state=S.RUNNING, started=1.0), done(value=ref({"a": (1, 2)})))["pi-1"][
        "first"
    ]
    assert step.value == {"a": (1, 2)}
    assert (step.status, step.reason, step.attempts, step.started, step.ended) == (
        S.SUCCEEDED,
        Reason.RETURNED,
        1,
        1.0,
        3.0,
    )


def test_a_step_without_records_waits_and_has_no_value_yet() -> None:
    step = fold()["pi-1"]["second"]
    assert (step.status, step.attempts) == (S.WAITING, 0)
    with pytest.raises(ResultNotReady, match="waiting"):
        _ = step.value


def test_a_value_of_none_is_a_value() -> None:
    assert fold(done())["pi-1"]["first"].value is None


def test_a_failed_step_raises_with_its_traceback_made_harmless() -> None:
    failed = done(state=S.FAILED, reason=Reason.RAISED, message="boom", error="Traceback\n\x1b[2JValueError: boom")
    step = fold(failed)["pi-1"]["first"]
    with pytest.raises(StepFailed, match="ValueError: boom") as caught:
        _ = step.value
    assert "\x1b" not in str(caught.value)
    assert caught.value.details == {"status": "failed", "reason": "raised"}
    assert step.error.endswith("boom")


def test_attempts_are_counted_and_kept() -> None:
    tries = [
        p.StepRecord(step="first", state=S.FAILED, attempt=n, reason=Reason.TIMEOUT, error=f"e{n}") for n in (1, 2)
    ]
    step = fold(*tries, done(attempt=3))["pi-1"]["first"]
    assert step.attempts == 3
    assert [(one.attempt, one.state) for one in step.history] == [(1, S.FAILED), (2, S.FAILED), (3, S.SUCCEEDED)]


def test_an_attempt_that_will_be_repeated_leaves_the_step_running() -> None:
    one = p.StepRecord(step="first", state=S.RUNNING)
    two = p.StepRecord(step="first", state=S.FAILED, reason=Reason.RAISED, error="e1")
    step = fold(one, two)["pi-1"]["first"]
    assert step.status is S.RUNNING
    assert step.error == "e1"


def test_an_iterated_step_gives_the_list_of_its_iterations() -> None:
    parts = [p.StepRecord(step="first", state=S.SUCCEEDED, iteration=i, value=ref(i * 10)) for i in (1, 0)]
    missed = p.StepRecord(step="first", state=S.FAILED, iteration=2, reason=Reason.RAISED)
    results = fold(*parts, missed, done(iterations=3))
    assert results["pi-1"]["first"].value == [0, 10, None]
    assert [row["iteration"] for row in results.rows()] == [0, 1, 2, None]


def test_a_fan_out_over_nothing_is_an_empty_list() -> None:
    assert fold(done(iterations=0))["pi-1"]["first"].value == []


def test_a_pickle_opens_only_on_trust(capsys: pytest.CaptureFixture[str]) -> None:
    class Loud:
        def __reduce__(self) -> Any:
            return print, ("opened",)

    results = fold(done(value=ref(Loud())))
    step = results["pi-1"]["first"]
    repr(results), repr(step), results._repr_html_(), results.rows()
    with pytest.raises(UntrustedValue, match="first"):
        _ = step.value
    assert capsys.readouterr().out == ""
    step.trust()
    assert capsys.readouterr().out == "opened\n"


def test_a_large_value_is_fetched_when_it_is_asked_for() -> None:
    body = payload.encode_value([1, 2, {3}]).body
    step = fold(done(value=p.ValueRef(sha256="d1", size=len(body))), blobs={"d1": body})["pi-1"]["first"]
    assert step.value == [1, 2, {3}]


def test_what_was_under_way_when_its_deployment_ended_has_failed_with_it() -> None:
    results = fold(p.StepRecord(step="first", state=S.RUNNING), state=D.FAILED)
    assert results["pi-1"]["first"].status is S.FAILED
    assert results["pi-1"]["first"].reason is Reason.EXECUTOR_LOST
    assert results["pi-1"]["second"].status is S.CANCELLED


def test_a_late_result_fills_the_gap_and_is_marked() -> None:
    step = fold(done(value=ref(5)), state=D.LOST, late=True)["pi-1"]["first"]
    assert step.value == 5
    assert step.late


def test_what_is_settled_stays_so() -> None:
    assert fold(done(value=ref(1)), done(state=S.FAILED))["pi-1"]["first"].value == 1


def test_a_record_of_an_unknown_kind_is_passed_over() -> None:
    ledger = Ledger()
    ledger.add("pi-1", p.Record(kind="from_the_future", at=0.0, body={"x": 1}))
    assert not ledger.deployments["pi-1"].steps


def test_results_are_mappings_that_may_be_asked_for_what_is_not_there() -> None:
    results = fold()
    assert ("pi-1" in results, "pi-2" in results, results.get("pi-2")) == (True, False, None)
    assert ("first" in results["pi-1"], "third" in results["pi-1"], results["pi-1"].get("third")) == (True, False, None)


def test_unknown_names_suggest_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="'pi-1'"):
        fold()["pi-2"]
    with pytest.raises(UnknownNameError, match="'first'"):
        fold()["pi-1"]["frist"]


def test_rows_are_flat_and_complete() -> None:
    row = fold(done(value=ref(7), usage=p.Usage(cpu=0.5, peak_memory=10)))["pi-1"].rows()[0]
    assert row["deployment"] == "pi-1"
    assert (row["value"], row["seconds"], row["cpu"], row["node"]) == (7, 2.0, 0.5, "raspi")


def test_each_attempt_has_a_row_and_the_one_that_counts_is_told() -> None:
    tries = [
        p.StepRecord(step="first", state=S.FAILED, attempt=n, reason=Reason.TIMEOUT, started=1.0, ended=2.0, error="e")
        for n in (1, 2)
    ]
    rows = fold(p.StepRecord(step="first", state=S.RUNNING, started=1.0), *tries, done(attempt=3, value=ref(9)))
    shown = [(r["step"], r["attempt"], r["state"], r["reason"], r["value"], r["last"]) for r in rows.rows()]
    assert shown == [
        ("first", 1, "failed", "timeout", None, False),
        ("first", 2, "failed", "timeout", None, False),
        ("first", 3, "succeeded", "returned", 9, True),
        ("second", 0, "waiting", None, None, True),
    ]


def test_each_attempt_of_each_iteration_has_a_row() -> None:
    parts = [
        p.StepRecord(step="first", state=state, iteration=i, attempt=n, started=1.0, ended=2.0, value=value)
        for i, n, state, value in (
            (0, 1, S.FAILED, None),
            (1, 1, S.SUCCEEDED, ref(10)),
            (0, 2, S.SUCCEEDED, ref(0)),
        )
    ]
    rows = fold(*parts, done(iterations=2))["pi-1"].rows()[:3]
    assert [(r["iteration"], r["attempt"], r["value"], r["last"]) for r in rows] == [
        (0, 1, None, False),
        (0, 2, 0, True),
        (1, 1, 10, True),
    ]


def test_an_attempt_under_way_and_a_step_that_never_ran_have_a_row() -> None:
    running = p.StepRecord(step="first", state=S.RUNNING, started=1.0)
    failed = p.StepRecord(step="first", state=S.FAILED, attempt=1, started=1.0, ended=2.0)
    never = p.StepRecord(step="second", state=S.CANCELLED, settled=True, reason=Reason.CANCELLED, ended=3.0)
    rows = fold(running, failed, never)["pi-1"].rows()
    assert [(r["step"], r["attempt"], r["state"], r["last"]) for r in rows] == [
        ("first", 1, "failed", False),
        ("first", 2, "running", True),
        ("second", 0, "cancelled", True),
    ]
    assert fold(never)["pi-1"]["second"].attempts == 0


def test_rows_open_no_value_where_it_is_not_wanted_or_cannot_be_had() -> None:
    spilled = p.ValueRef(sha256="0" * 64, size=10, summary="an array")

    def lost(digest: str, size: int) -> bytes:
        raise NotFound("The blob is gone.")

    results = fold(done(value=spilled))
    results["pi-1"].reader = Reader(
        blob=lost, graph=lambda d: GRAPH, logs=lambda d, s: Logs(), artifacts=lambda d, s: []
    )
    for values in (True, False):
        row = results.rows(values=values)[0]
        assert (row["value"], row["summary"]) == (None, "an array")
    with pytest.raises(NotFound):
        _ = results["pi-1"]["first"].value


def test_rows_make_a_frame() -> None:
    frame = pandas.DataFrame(fold(done(value=ref({"loss": 0.5}), usage=p.Usage(cpu=0.5)), done("second")).rows())
    assert list(frame[frame["last"]]["step"]) == ["first", "second"]
    assert frame["seconds"].sum() == 4.0


def test_a_record_that_cannot_be_read_does_not_hide_the_others() -> None:
    ledger = Ledger()
    ledger.add("pi-1", p.Record(kind="step", at=0.0, body={"step": 3, "state": "flying"}))
    ledger.add("pi-1", record(done(value=ref(1))))
    assert list(ledger.deployments["pi-1"].steps) == ["first"]


@pytest.mark.parametrize("at", [1e300, -1e300, 1e18, -5.0])
def test_times_that_a_node_made_up_are_shown_and_break_nothing(at: float) -> None:
    results = fold(done(started=at, ended=-at))
    assert "first" in repr(results)
    assert "first" in results["pi-1"].to_svg()


def test_nothing_that_a_node_wrote_reaches_terminal_or_page_unescaped() -> None:
    results = fold(
        done(value=p.ValueRef(summary="<script>\x1b[2J", json=1)), done("second\x1b", state=S.FAILED, message="\x9b")
    )
    assert not {"\x1b", "\x9b"} & set(repr(results) + repr(results["pi-1"]["first"]) + repr(results["pi-1"]))
    assert "<script" not in results._repr_html_() + results["pi-1"]._repr_html_()


def test_results_are_drawn_with_states_reasons_and_durations() -> None:
    results = fold(
        done(), done("second", state=S.FAILED, reason=Reason.TIMEOUT, started=3.0, ended=33.0), state=D.FAILED
    )["pi-1"]
    assert "succeeded · 2.0 s" in results.to_svg()
    assert "failed · timeout · 30.0 s" in results.to_svg()
    assert 'n1["second<br/>failed · timeout · 30.0 s"]' in results.to_mermaid()
    assert "n0 -> n1" in results.to_dot()


def test_results_of_a_run_that_goes_on_are_drawn_as_they_stand() -> None:
    text = fold(p.StepRecord(step="first", state=S.RUNNING, started=1.0))["pi-1"].to_mermaid()
    assert "class n0 running" in text
    assert "class n1 waiting" in text


def test_results_without_a_graph_cannot_be_drawn() -> None:
    with pytest.raises(ResultNotReady, match="no graph"):
        fold(graph="")["pi-1"].to_svg()


# --- steps that are DAGs ----------------------------------------------------------------------------------------------

NESTED = Graph(
    name="outer",
    steps=(
        StepSpec(name="plain", task="t", code="", args=""),
        StepSpec(name="outer", task="t", code="", args="", graph=GRAPH),
    ),
)
PATHS = tuple(path for path, _ in NESTED.walk())


def inner(*bodies: p.StepRecord, state: DeploymentState = D.RUNNING) -> DeploymentResults:
    ledger = Ledger()
    ledger.deployments["pi-1"] = DeploymentLedger()
    for body in bodies:
        ledger.add("pi-1", record(body))
    info = p.DeploymentInfo(name="pi-1", node="raspi", state=state)
    reader = Reader(
        blob=lambda digest, size: b"", graph=lambda digest: NESTED, logs=lambda d, s: Logs(), artifacts=lambda d, s: []
    )
    return DeploymentResults(info, ledger.deployments["pi-1"], PATHS, reader)


def test_what_runs_inside_of_a_step_is_what_runs() -> None:
    results = inner(
        p.StepRecord(step="outer", state=S.RUNNING),
        p.StepRecord(step="outer[0]/first", state=S.RUNNING),
        p.StepRecord(step="outer[0]/first", state=S.SUCCEEDED, settled=True),
        p.StepRecord(step="outer[0]/second", state=S.RUNNING),
    )
    assert results.running == ("outer[0]/second",)
    assert [step.name for step in results.walk()] == ["plain", "outer", "outer[0]/first", "outer[0]/second"]
    assert results["outer"][0]["first"].status is S.SUCCEEDED


def test_the_last_attempt_is_the_one_that_is_shown() -> None:
    results = inner(
        p.StepRecord(step="outer/first", state=S.FAILED, settled=True),
        p.StepRecord(step="outer", state=S.FAILED, attempt=1),
        p.StepRecord(step="outer~2/first", state=S.SUCCEEDED, settled=True),
    )
    assert results["outer"]["first"].status is S.SUCCEEDED
    assert results["outer/first"].status is S.FAILED


def test_what_is_inside_of_a_step_that_ended_without_it_has_ended() -> None:
    results = inner(p.StepRecord(step="outer", state=S.CANCELLED, settled=True))
    assert results["outer"]["first"].status is S.CANCELLED


@pytest.mark.parametrize("path", ["outer", "plain", "outer~", "outer/third", 3])
def test_a_node_cannot_make_a_value_refer_to_what_is_not_inside(path: object) -> None:
    for reference in (p.ValueRef(format="steps", json={"x": path}), p.ValueRef(format="step", json=path)):
        results = inner(p.StepRecord(step="outer", state=S.SUCCEEDED, settled=True, value=reference))
        with pytest.raises(BadAnswer, match="not inside"):
            _ = results["outer"].value
