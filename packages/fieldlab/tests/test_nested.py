"""Steps that are DAGs, run here: their values, results by iteration, logs, artifacts, drawings, simulation."""

from __future__ import annotations

import sys

import fieldlab as fl
import pytest
from fieldlab_common.lifecycle import DeploymentState, Reason, StepState

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="executors do not run on Windows")


@fl.task
def hosts() -> list[str]:
    return ["a", "bb", "ccc"]


@fl.task
def fetch(host: str, rate: int = 1, *, ctx: fl.TaskContext) -> dict[str, object]:
    print(f"fetching {host}")
    with open(ctx.artifact("host.txt"), "w") as file:
        file.write(host)
    return {"host": host, "rate": rate, "step": ctx.step, "iteration": ctx.iteration, "seen": sorted(ctx.results)}


@fl.task
def length(found: dict[str, str]) -> int:
    return len(found["host"])


@fl.task
def total(values: list[int]) -> int:
    return sum(values)


@fl.task
def fail(text: str) -> None:
    raise ValueError(text)


def collecting() -> fl.DAG:
    with fl.DAG("collect") as dag:
        length(fetch(fl.arg("host"), fl.arg("rate", 7)))
    return dag


@pytest.fixture(scope="module")
def results() -> fl.DeploymentResults:
    collect = collecting()
    with fl.DAG("survey") as dag:
        found = hosts()
        collect(found[1], rate=fl.node["rate"]).named("one")
        total(fl.map(collect, found).named("each"))
        fl.repeat(collect("dddd"), times=2).named("again")
    experiment = fl.Experiment("survey").map(dag, fl.Node.dummy("here", rate=3))
    return fl.run(experiment).results["here"]


def test_values_go_in_and_come_out(results: fl.DeploymentResults) -> None:
    assert results["one"].value == 2
    assert results["each"].value == [1, 2, 3]
    assert results["again"].value == [4, 4]
    assert results["total"].value == 6
    assert results["one"]["fetch"].value["rate"] == 3


def test_steps_inside_are_found_by_name_by_iteration_and_by_path(results: fl.DeploymentResults) -> None:
    assert results["each"][2]["fetch"].value["host"] == "ccc"
    assert results["each[2]/fetch"].value["step"] == "each[2]/fetch"
    assert results["one/fetch"].name == results["one"]["fetch"].name == "one/fetch"
    assert [one["length"].value for one in results["each"].iterations] == [1, 2, 3]
    assert results["each"][-1].scope == "each[2]"
    assert set(results) == {"hosts", "one", "each", "total", "again"}
    assert list(results["one"].steps) == ["fetch", "length"]


def test_a_task_inside_sees_its_iteration_and_the_steps_around_it(results: fl.DeploymentResults) -> None:
    value = results["each"][1]["fetch"].value
    assert value["iteration"] == 1
    assert "hosts" in value["seen"]
    assert "length" not in value["seen"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda r: r["one"]["fetsh"], "fetch"),
        (lambda r: r["each"]["fetch"], "ran 3 times"),
        (lambda r: r["each"][3], "no iteration 3"),
        (lambda r: r["hosts"]["x"], "is no DAG"),
        (lambda r: r["one/nothing"], "one/nothing"),
        (lambda r: r["one[x]/fetch"], "There is no step"),
    ],
)
def test_what_is_not_there_is_an_error_that_says_what_is(results: fl.DeploymentResults, where, message: str) -> None:
    with pytest.raises(fl.errors.UnknownNameError, match=message):
        where(results)


def test_logs_and_artifacts_are_those_of_the_steps_inside(results: fl.DeploymentResults) -> None:
    assert [line.text for line in results["each"][0]["fetch"].logs] == ["fetching a"]
    assert sorted(line.text for line in results["each"].logs) == ["fetching a", "fetching bb", "fetching ccc"]
    assert [one.read() for one in results["one"].artifacts] == [b"bb"]


def test_rows_have_every_step_of_every_iteration(results: fl.DeploymentResults) -> None:
    rows = [row for row in results.rows() if row["step"] == "each/fetch"]
    assert [(row["path"], row["iteration"], row["value"]["host"]) for row in rows] == [
        ("each[0]/fetch", 0, "a"),
        ("each[1]/fetch", 1, "bb"),
        ("each[2]/fetch", 2, "ccc"),
    ]


def test_tables_show_what_is_inside_of_what_ran_once(results: fl.DeploymentResults) -> None:
    assert "one/fetch" in repr(results)
    assert "each[0]" not in repr(results)
    assert "fetch" in repr(results["each"][0])


def test_what_is_inside_is_drawn_with_how_it_stands(results: fl.DeploymentResults) -> None:
    assert "fetch" in results["each"][1].to_svg()
    assert "class n0,n1 succeeded" in results["one"].steps.to_mermaid()
    assert "subgraph n" in results.to_mermaid()
    assert "DAG of 2 steps" in results.to_svg()


def test_artifacts_land_in_folders_of_their_iteration(tmp_path) -> None:
    with fl.DAG("d") as dag:
        fl.map(collecting(), hosts())
    run = fl.run(fl.Experiment("e").map(dag, fl.Node.dummy("n")))
    run.artifacts.download(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.txt")) == [
        f"n/collect[{number}]/fetch/1/host.txt" for number in range(3)
    ]


def test_a_failure_inside_is_its_failure_with_the_traceback() -> None:
    with fl.DAG("bad") as bad:
        fail("this went wrong")
    with fl.DAG("d") as dag:
        bad.as_task(retries=1)()
    results = fl.run(dag)
    assert results.state is DeploymentState.FAILED
    assert (results["bad"].reason, results["bad"].attempts) == (Reason.STEP_FAILED, 2)
    assert "this went wrong" in results["bad"].error
    assert results["bad"]["fail"].name == "bad~2/fail"
    with pytest.raises(fl.StepFailed, match="this went wrong"):
        _ = results["bad"].value


def test_what_is_inside_of_a_skipped_one_is_skipped() -> None:
    with fl.DAG("d") as dag:
        collecting()("a").when(total([0]), bool)
    results = fl.run(dag)
    assert results["collect"]["fetch"].status is StepState.SKIPPED


def test_several_last_steps_give_a_dict() -> None:
    with fl.DAG("two") as two:
        total([1]).named("first")
        total([2]).named("second")
    with fl.DAG("d") as dag:
        total([two()["first"], 10])
    results = fl.run(dag)
    assert results["two"].value == {"first": 1, "second": 2}
    assert results["total"].value == 11


def test_dags_in_a_row_run_in_a_row() -> None:
    with fl.DAG("a") as a:
        total([1])
    with fl.DAG("b") as b:
        total([2])
    results = fl.run(a >> b)
    assert results["b"]["total"].started >= results["a"]["total"].ended
    assert results["b"].value == 2


def test_it_is_simulated_by_the_same_rules() -> None:
    with fl.DAG("d") as dag:
        fl.repeat(collecting()("a"), every="1h", duration="24h")
    simulation = fl.simulate(dag, durations={"collect/fetch": 60, "length": (1, 2)})
    assert simulation.results["localhost"]["collect/fetch"].attempts == 24
    starts = {row.step: row.at for row in simulation.timeline if row.state is StepState.RUNNING}
    assert starts["collect[23]/fetch"] - starts["collect[0]/fetch"] == pytest.approx(23 * 3600)
