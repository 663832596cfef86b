"""Bad input gives a clear, typed error that says what to do, and nothing is lost by it."""

from __future__ import annotations

import socket
import threading
from typing import Any

import fieldlab as fl
import pytest
from fieldlab_director import Embedded

LOCK = threading.Lock()


@fl.task
def one() -> int:
    return 1


@fl.task
def add(a: int, b: int = 0) -> int:
    return a + b


def _dag(task: fl.Task[Any] = one) -> fl.DAG:
    with fl.DAG("dag") as dag:
        task()
    return dag


def test_no_director_at_the_endpoint() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(fl.DirectorUnreachable, match=endpoint):
        fl.Client(endpoint, token="flu_x_y", timeout=5).nodes()


def test_no_endpoint_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("FIELDLAB_ENDPOINT", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(fl.ConfigurationError, match="FIELDLAB_ENDPOINT"):
        fl.Client()


@pytest.mark.parametrize("token", ["flu_abc_wrong", "nonsense", None])
def test_a_wrong_token(director: Embedded, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIELDLAB_TOKEN", raising=False)
    with pytest.raises(fl.AuthenticationError, match="token"):
        fl.Client(director.url, token=token).nodes()


def test_a_name_that_is_taken(client: fl.Client, name: str) -> None:
    exp = fl.Experiment(name).map(_dag(), client.nodes()["a"])
    first = client.submit(exp)
    with pytest.raises(fl.ExperimentExists, match='if_exists="attach"'):
        client.submit(exp)
    assert client.submit(exp, if_exists="attach").id == first.id
    second = client.submit(exp, if_exists="new")
    assert second.name == f"{name}#2"
    assert first.wait(60) is second.wait(60) is fl.ExperimentState.SUCCEEDED


def test_a_task_that_cannot_be_pickled_names_the_culprit(client: fl.Client, name: str) -> None:
    lock = threading.Lock()

    @fl.task
    def guarded() -> None:
        with lock:
            pass

    exp = fl.Experiment(name).map(_dag(guarded), client.nodes()["a"])
    with pytest.raises(fl.PlanError, match=r"guarded.*'lock'") as caught:
        client.submit(exp)
    assert len(caught.value.problems) == 1
    assert fl.plan(exp).problems[0].code == fl.UnpicklableError.code
    with pytest.raises(fl.NotFound):
        client.run(name)


def test_an_argument_that_cannot_be_pickled_names_the_culprit(client: fl.Client, name: str) -> None:
    with fl.DAG("dag") as dag:
        add(1, {"held": LOCK})
    with pytest.raises(fl.PlanError, match=r"add.*'held'"):
        client.submit(fl.Experiment(name).map(dag, client.nodes()["a"]))


def test_a_cycle(client: fl.Client, name: str) -> None:
    with fl.DAG("dag") as dag:
        first = one().named("first")
        second = one().named("second").after(first)
        first.after(second)
    with pytest.raises(fl.CycleError, match=r"first -> second -> first|second -> first -> second"):
        client.submit(fl.Experiment(name).map(dag, client.nodes()["a"]))
    with pytest.raises(fl.CycleError):
        fl.run(dag)


def test_a_node_that_is_not_there(client: fl.Client, name: str) -> None:
    nodes = client.nodes()
    with pytest.raises(fl.UnknownNameError, match="a, b, c"):
        nodes["d"]
    with pytest.raises(fl.NotEnoughNodes, match=r"there are 3 \(a, b, c\)"):
        nodes.take(4)
    with pytest.raises(fl.NotEnoughNodes, match="has no `site`"):
        nodes.where(fl.node["site"] == "roof").take(1)
    with pytest.raises(fl.NotFound, match="nowhere"):
        client.submit(fl.Experiment(name).map(_dag(), fl.Node.dummy("nowhere", python=["3.11"])))


@pytest.mark.parametrize("bad", ["../x", "/etc/x", "a/../../x", "", "c:\\x"])
def test_an_artifact_name_that_would_leave_its_folder(bad: str) -> None:
    @fl.task
    def writes(*, ctx: fl.TaskContext) -> None:
        ctx.artifact(bad)

    step = fl.run(_dag(writes), timeout=60)["writes"]
    assert (step.status, step.reason) == (fl.StepState.FAILED, fl.Reason.RAISED)
    assert "ArtifactNameError" in step.error
    assert "'out/trace.csv'" in step.error or "1 to 255" in step.error


def test_a_result_that_json_cannot_hold_opens_on_trust_alone(client: fl.Client, name: str) -> None:
    @fl.task
    def returns_code() -> Any:
        return lambda: 42

    run = client.submit(fl.Experiment(name).map(_dag(returns_code), client.nodes()["a"]))
    assert run.wait(60) is fl.ExperimentState.SUCCEEDED
    step = run.results["a"]["returns_code"]
    with pytest.raises(fl.UntrustedValue, match="trust"):
        _ = step.value
    assert step.trust()() == 42


def test_a_result_that_nothing_can_hold_fails_its_step() -> None:
    @fl.task
    def returns_a_lock() -> Any:
        return threading.Lock()

    step = fl.run(_dag(returns_a_lock), timeout=60)["returns_a_lock"]
    assert (step.status, step.reason) == (fl.StepState.FAILED, fl.Reason.BAD_RESULT)
    assert "lock" in step.message


@pytest.mark.parametrize("where", ["here", "director"])
def test_a_barrier_that_nobody_else_reaches_breaks_and_says_who_is_missing(
    client: fl.Client, name: str, where: str
) -> None:
    with fl.DAG("waiting") as waiting:
        fl.barrier("start")
    exp = fl.Experiment(name).map(waiting, client.nodes()["a"]).map(_dag(), client.nodes()["b"])
    run = client.submit(exp) if where == "director" else fl.run(exp)
    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    step = run.results["a"]["barrier"]
    assert (step.status, step.reason) == (fl.StepState.FAILED, fl.Reason.BARRIER_BROKEN)
    assert "b (succeeded)" in step.message
    assert run.results["b"]["one"].value == 1


def test_arguments_are_checked_at_the_users_line() -> None:
    with pytest.raises(fl.ArgumentError, match="add"):
        add()
    with pytest.raises(fl.StepMisuseError, match=r"fl\.map"):
        list(one())
