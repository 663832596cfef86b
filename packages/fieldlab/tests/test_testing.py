"""The director for tests: what stands in for running, virtual time, and what is made to go wrong.

That it answers as a real one does is held in ``tests/contract/test_directors.py``.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest
from fieldlab.testing import FakeDirector, InTurn, StandIn
from fieldlab_common.errors import UnknownNameError, UnsupportedError


@fl.task(retries=2)
def probe(host: str) -> dict[str, float]:
    raise AssertionError("a task of the user's runs")


@fl.task
def report(answers: list[dict[str, float]]) -> float:
    raise AssertionError("a task of the user's runs")


@fl.task
def capture(*, ctx: fl.TaskContext) -> fl.Artifact:
    raise AssertionError("a task of the user's runs")


def play(dag: fl.DAG, nodes: Any = 1, **stand_ins: Any) -> tuple[FakeDirector, fl.Run]:
    """The director, and the run of a DAG on all its nodes."""
    director = FakeDirector(nodes, stand_ins=stand_ins)
    client = director.client()
    return director, client.submit(fl.Experiment("e").map(dag, client.nodes()))


def ended(dag: fl.DAG, **stand_ins: Any) -> fl.DeploymentResults:
    director, run = play(dag, **stand_ins)
    with director:
        run.wait(timeout=1e6)
        return run.results["node-1"]


@pytest.fixture
def two() -> fl.DAG:
    with fl.DAG("two") as dag:
        report([probe("a"), probe("b")])
    return dag


# --- what stands in ---------------------------------------------------------------------------------------------------


def test_a_value_is_what_the_step_returns(two: fl.DAG) -> None:
    results = ended(two, probe={"loss": 0.5}, report=1.5)
    assert results["probe"].value == {"loss": 0.5}
    assert results["report"].value == 1.5


def test_a_step_without_one_returns_none_at_once(two: fl.DAG) -> None:
    results = ended(two)
    assert (results.state, results["report"].value) == (fl.DeploymentState.SUCCEEDED, None)


def test_a_function_is_called_with_the_steps_arguments(two: fl.DAG) -> None:
    results = ended(two, probe=lambda host: {"loss": float(len(host))}, report=lambda answers: len(answers))
    assert results["report"].value == 2


def test_a_name_of_a_step_goes_before_that_of_its_task_and_one_of_a_deployment_before_both(two: fl.DAG) -> None:
    stand_ins = {"*": 0, "probe": 1, "probe-2": 2, ("node-2", "probe"): 3}
    with FakeDirector(2, stand_ins=stand_ins) as director:
        client = director.client()
        run = client.submit(fl.Experiment("e").map(two, client.nodes()))
        run.wait()
        values = {one: [step.value for step in run.results[one].values()] for one in run.results}
    assert values == {"node-1": [1, 2, 0], "node-2": [3, 2, 0]}


def test_an_exception_is_how_it_fails_and_attempts_come_in_turn(two: fl.DAG) -> None:
    results = ended(two, probe=InTurn(OSError("no route"), StandIn(error="again"), {"loss": 0.0}))
    assert results["report"].status is fl.StepState.SUCCEEDED
    shown = [(row["step"], row["attempt"], row["state"], row["message"]) for row in results.rows()]
    for step in ("probe", "probe-2"):
        assert (step, 1, "failed", "OSError: no route") in shown
        assert (step, 2, "failed", "again") in shown
        assert results[step].value == {"loss": 0.0}


def test_what_always_fails_fails_the_run_with_its_words(two: fl.DAG) -> None:
    results = ended(two, probe=ValueError("boom"))
    assert results.state is fl.DeploymentState.FAILED
    assert results["probe"].attempts == 3
    assert "ValueError: boom" in results["probe"].error


def test_output_is_the_steps_log(two: fl.DAG) -> None:
    director, run = play(two, probe=StandIn(output="one\ntwo\n"))
    with director:
        assert [str(line) for line in run.logs(follow=True)] == [
            "[node-1/probe] one",
            "[node-1/probe] two",
            "[node-1/probe-2] one",
            "[node-1/probe-2] two",
        ]


def test_conditions_maps_and_repeats_are_decided_by_what_stands_in() -> None:
    with fl.DAG("d") as dag:
        first = probe("a")
        probe("traced").named("traced").when(first, lambda r: r["loss"] > 0.1)
        probe("calm").named("calm").when(first, lambda r: r["loss"] <= 0.1)
        fl.map(probe, report([first]).named("hosts")).named("each")
        fl.repeat(probe("again").named("until"), times=10, until=lambda r: r["loss"] == 0)
    results = ended(
        dag, probe={"loss": 0.5}, hosts=["x", "y", "z"], until=InTurn({"loss": 2}, {"loss": 1}, {"loss": 0})
    )
    assert results["traced"].status is fl.StepState.SUCCEEDED
    assert results["calm"].status is fl.StepState.SKIPPED
    assert len(results["each"].value) == 3
    assert results["until"].value == [{"loss": 2}, {"loss": 1}, {"loss": 0}]


def test_a_background_step_runs_until_it_is_not_needed() -> None:
    with fl.DAG("d") as dag:
        sniff = fl.background(capture())
        probe("a").during(sniff)
    results = ended(dag, probe=StandIn(after=5), capture="a trace")
    assert results["capture"].value == "a trace"
    started, over = results["capture"].started or 0, results["capture"].ended or 0
    assert over - started == pytest.approx(5)


def test_dags_inside_of_dags_are_played_too() -> None:
    with fl.DAG("inner") as inner:
        probe(fl.arg("host")) >> probe("last").named("last")
    with fl.DAG("outer") as outer:
        report([inner(host="x").named("one")])
    results = ended(outer, probe=lambda host: {"host": len(host)}, report=lambda answers: answers)
    assert results["report"].value == [{"host": 4}]
    assert results["one"]["probe"].value == {"host": 1}


def test_what_cannot_travel_is_a_bad_result(two: fl.DAG) -> None:
    assert ended(two, probe=StandIn(value=threading.Lock()))["probe"].reason is fl.Reason.BAD_RESULT


# --- barriers, gates, events ------------------------------------------------------------------------------------------


def test_a_barrier_fills_across_deployments() -> None:
    with fl.DAG("d") as dag:
        first = probe("a")
        met = fl.barrier("start", parties="all", timeout=60).after(first)
        probe("b").named("after").after(met)
    with FakeDirector(2, stand_ins={("node-2", "probe"): StandIn(after=30)}) as director:
        client = director.client()
        run = client.submit(fl.Experiment("e").map(dag, client.nodes()))
        assert run.wait() is fl.ExperimentState.SUCCEEDED
        assert {run.results[one]["after"].started for one in run.results} == {run.results["node-2"]["probe"].ended}


def test_a_barrier_that_cannot_fill_says_who_is_missing() -> None:
    with fl.DAG("d") as dag:
        fl.barrier("start", parties="all", timeout=60).after(probe("a"))
    with FakeDirector(2, stand_ins={("node-2", "probe"): ValueError("down")}) as director:
        client = director.client()
        run = client.submit(fl.Experiment("e").map(dag, client.nodes()))
        assert run.wait() is fl.ExperimentState.FAILED
        assert "missing: node-2 (failed)" in run.results["node-1"]["barrier"].message


def test_a_gate_waits_for_its_event_and_no_longer_than_it_may() -> None:
    with fl.DAG("d") as dag:
        fl.wait_for("go", timeout=600)
    director, run = play(dag)
    with director:
        run.events.send("go", {"rate": 10})
        run.wait()
        assert run.results["node-1"]["wait_for"].value == {"rate": 10}
    late, run = play(dag)
    with late:
        assert run.wait() is fl.ExperimentState.FAILED
        assert late.elapsed() == pytest.approx(600, abs=25)


def test_another_thread_may_send_what_a_wait_waits_for() -> None:
    with fl.DAG("d") as dag:
        fl.wait_for("go") >> fl.send("went")
    director, run = play(dag)
    with director:
        sender = threading.Timer(0.05, lambda: run.events.send("go"))
        sender.start()
        assert [event.sender for event in run.events.wait("went", timeout=1e6)] == ["node-1"]
        sender.join()


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_day_passes_while_it_is_waited_for() -> None:
    with fl.DAG("d") as dag:
        fl.repeat(probe("a"), every=3600, duration=86_400)
    director, run = play(dag, probe=StandIn(value=1, after="2m"))
    with director:
        assert run.wait() is fl.ExperimentState.SUCCEEDED
        assert len(run.results["node-1"]["probe"].value) == 24
        assert 23 * 3600 < director.elapsed() < 25 * 3600


def test_time_passes_only_when_somebody_waits(two: fl.DAG) -> None:
    director, run = play(two, probe=StandIn(value=1, after=60))
    with director:
        assert run.results["node-1"]["probe"].status is fl.StepState.RUNNING
        with pytest.raises(fl.WaitTimeout, match="within 30 s"):
            run.wait(timeout=30)
        director.advance(29)
        assert run.results["node-1"]["probe"].status is fl.StepState.RUNNING
        director.advance(2)
        assert run.results["node-1"]["probe"].value == 1


def test_a_run_under_way_is_cancelled(two: fl.DAG) -> None:
    director, run = play(two, probe=StandIn(after=60))
    with director:
        assert run.state is fl.ExperimentState.RUNNING
        run.cancel("enough")
        assert run.wait() is fl.ExperimentState.CANCELLED
        assert director.elapsed() < 60
        assert run.results["node-1"]["probe"].status is fl.StepState.CANCELLED


def test_a_start_that_is_for_a_time_is_at_that_time(two: fl.DAG) -> None:
    import datetime as dt

    with FakeDirector(1, stand_ins={}) as director:
        client = director.client()
        at = dt.datetime.fromtimestamp(client.health().time + 7200, dt.UTC)
        run = client.submit(fl.Experiment("e", start_at=at).map(two, client.nodes()))
        assert run.wait() is fl.ExperimentState.SUCCEEDED
        assert run.info.started == pytest.approx(at.timestamp())


def test_what_is_repeated_without_end_in_no_time_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fieldlab import world

    monkeypatch.setattr(world, "MOST_CALLS", 1000)
    with fl.DAG("d") as dag:
        fl.repeat(probe("a"), duration=86_400)
    with pytest.raises(UnsupportedError, match="takes time"):
        play(dag, probe=1)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_errors_are_made_to_come_where_they_are_wanted(two: fl.DAG) -> None:
    with FakeDirector(stand_ins={}) as director:
        client = director.client()
        client.health()
        director.fail("nodes", fl.PermissionDenied("Not today.", advice="Come back tomorrow."))
        with pytest.raises(fl.PermissionDenied, match=r"Not today\. Come back tomorrow\."):
            client.nodes()
        assert len(client.nodes()) == 2
        with pytest.raises(UnknownNameError, match="submit"):
            director.fail("sumbit", fl.NotFound("x"))


def test_what_passes_is_waited_out_without_waiting(two: fl.DAG) -> None:
    with FakeDirector(stand_ins={}) as director:
        client = director.client()
        client.health()
        director.fail("nodes", fl.Unavailable("It restarts."), times=3)
        assert len(client.nodes()) == 2
        assert director.asked == ("health", *["nodes"] * 4)
        assert director.elapsed() > 0.3
        director.fail("nodes", fl.DirectorUnreachable("Nobody answers."), times=100)
        with pytest.raises(fl.DirectorUnreachable):
            client.nodes()


def test_an_answer_that_is_lost_was_carried_out(two: fl.DAG) -> None:
    with FakeDirector(1, stand_ins={}) as director:
        client = director.client()
        client.health()
        director.lose_answer("submit", times=2)
        run = client.submit(fl.Experiment("once").map(two, client.nodes()))
        assert director.asked.count("submit") == 3
        assert [one.name for one in client.experiments()] == ["once"]
        assert run.wait() is fl.ExperimentState.SUCCEEDED


# --- the tasks themselves ---------------------------------------------------------------------------------------------


@fl.task
def write(text: str, *, ctx: fl.TaskContext) -> int:
    print("on", ctx.node.name, ctx.node["site"])
    return Path(ctx.artifact("x.txt")).write_text(text)


def test_without_stand_ins_the_tasks_run_here(tmp_path: Path) -> None:
    with fl.DAG("d") as dag:
        fl.wait_for("go") >> write(fl.secret("word"))
    with FakeDirector([{"name": "a", "site": "lab"}]) as director:
        client = director.client()
        client.secrets.set("word", "hush-hush")
        run = client.prepare(fl.Experiment("here").map(dag, client.nodes()))
        run.start()
        run.events.send("go")
        assert run.wait(timeout=60, raise_on_failure=True) is fl.ExperimentState.SUCCEEDED
        assert run.results["a"]["write"].value == 9
        assert [line.text for line in run.logs(step="write")] == ["on a lab"]
        (written,) = run.artifacts.download(tmp_path)
        assert written.read_text() == "hush-hush"
        with pytest.raises(UnsupportedError):
            director.advance(1)
