"""``fl.run``: the same DAG here, with real executors, no director and no port. Every test starts its own."""

from __future__ import annotations

import datetime as dt
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest
from fieldlab_common.events import DEPLOYMENT, START

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="executors do not run on Windows")


@fl.task
def add(a: int, b: int) -> int:
    return a + b


@fl.task
def fail(text: str) -> None:
    raise ValueError(text)


@fl.task
def pid_of_me(*, ctx: fl.TaskContext) -> int:
    ctx.events.send("pid", os.getpid())
    ctx.stopping.wait()
    return os.getpid()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_dag_gives_the_results_of_its_steps() -> None:
    with fl.DAG("sum") as dag:
        add(add(1, 2), 3).named("total")
    results = fl.run(dag)
    assert results["total"].value == 6
    assert results["add"].value == 3
    assert results.state is fl.DeploymentState.SUCCEEDED


def test_a_failure_is_a_result_with_its_traceback() -> None:
    with fl.DAG("d") as dag:
        fail("this went wrong")
    step = fl.run(dag)["fail"]
    assert (step.status, step.reason) == (fl.StepState.FAILED, fl.Reason.RAISED)
    with pytest.raises(fl.StepFailed, match="this went wrong"):
        _ = step.value


def test_output_and_artifacts_are_there_afterwards(tmp_path: Path) -> None:
    @fl.task
    def write(*, ctx: fl.TaskContext) -> None:
        print("hello from the step")
        Path(ctx.artifact("out/a.txt")).write_text("content")

    with fl.DAG("d") as dag:
        write()
    step = fl.run(dag)["write"]
    assert [line.text for line in step.logs if line.stream == "stdout"] == ["hello from the step"]
    assert [one.name for one in step.artifacts] == ["out/a.txt"]
    assert step.artifacts[0].read() == b"content"
    assert step.artifacts[0].download(tmp_path / "x").read_text() == "content"


def test_a_large_value_and_one_that_is_no_data_come_back() -> None:
    @fl.task
    def large() -> bytes:
        return b"x" * 3_000_000

    @fl.task
    def opaque() -> Any:
        return threading.Thread

    with fl.DAG("d") as dag:
        large()
        opaque()
    results = fl.run(dag)
    assert results["large"].value == b"x" * 3_000_000
    with pytest.raises(fl.UntrustedValue):
        _ = results["opaque"].value
    assert results["opaque"].trust() is threading.Thread


def test_a_file_arrives_as_a_path(tmp_path: Path) -> None:
    @fl.task
    def read(path: str) -> str:
        return Path(path).name + ":" + Path(path).read_text()

    (tmp_path / "in.txt").write_text("data")
    with fl.DAG("d") as dag:
        read(fl.File(str(tmp_path / "in.txt")))
    assert fl.run(dag)["read"].value == "in.txt:data"


def test_an_experiment_plays_every_node_with_one_event_log() -> None:
    @fl.task
    def meet(*, ctx: fl.TaskContext) -> Any:
        ctx.events.send("hello", ctx.node.name)
        ctx.barrier("all")
        return sorted(event.data for event in ctx.events.wait("hello", count=2)), ctx.node["site"]

    with fl.DAG("d") as dag:
        meet()
    nodes = [fl.Node.dummy("pi-1", site="lab"), fl.Node.dummy("pi-2", site="roof", python=["3.13"])]
    run = fl.run(fl.Experiment("e").map(dag, nodes))
    assert run.state is fl.ExperimentState.SUCCEEDED
    assert run.results["pi-1"]["meet"].value == (["pi-1", "pi-2"], "lab")
    assert run.results["pi-2"]["meet"].value == (["pi-1", "pi-2"], "roof")


def test_each_round_has_a_barrier_and_a_gate_of_its_own() -> None:
    """Two nodes, three rounds: one sends on after each barrier, the other takes it at a gate before the next."""

    @fl.task
    def give(*, ctx: fl.TaskContext) -> int:
        number: int = ctx.store.get("given", 0)
        ctx.store["given"] = number + 1
        ctx.events.send("go", number)
        return number

    @fl.task
    def meet(*, ctx: fl.TaskContext) -> list[str]:
        ctx.events.send("before", ctx.iteration)
        ctx.barrier("met")
        return [f"{e.sender}{e.data}" for e in ctx.events.wait("before", count=2 * ctx.iteration + 2, timeout=60)]

    with fl.DAG("round") as sending:
        give().after(fl.barrier("start"))
    with fl.DAG("round") as taking:
        fl.wait_for("go", timeout=60).after(fl.barrier("start"))
    experiment = fl.Experiment("e")
    for inner, name in ((sending, "a"), (taking, "b")):
        with fl.DAG(name) as dag:
            fl.repeat(meet(), every=0, times=3).after(fl.repeat(inner(), every=0, times=3).named("rounds"))
        experiment.map(dag, fl.Node.dummy(name))
    run = fl.run(experiment)
    assert run.state is fl.ExperimentState.SUCCEEDED, run.results
    assert run.results["a"]["rounds"].value == run.results["b"]["rounds"].value == [0, 1, 2]
    for seen in run.results["a"]["meet"].value, run.results["b"]["meet"].value:
        assert [set(one) for one in seen] == [{f"{who}{n}" for who in "ab" for n in range(up + 1)} for up in range(3)]


def test_a_run_can_be_talked_to_and_cancelled_while_it_goes_on() -> None:
    with fl.DAG("d") as dag:
        go = fl.wait_for("go")
        pid_of_me().after(go)
    run = fl.run(fl.Experiment("e").map(dag, fl.Node.dummy("a")), wait=False)
    run.events.send("go")
    pid = run.events.wait("pid", timeout=60)[0].data
    run.cancel(reason="enough")
    assert run.wait(timeout=60) is fl.ExperimentState.CANCELLED
    assert gone(pid)
    assert run.results["a"]["pid_of_me"].status is fl.StepState.CANCELLED
    run.close()


def test_a_timeout_cancels_and_leaves_nothing() -> None:
    with fl.DAG("d") as dag:
        fl.wait_for("never")
    with pytest.raises(fl.WaitTimeout):
        fl.run(dag, timeout=1.5)
    assert not subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "fieldlab_executor"], capture_output=True).stdout


def test_an_environment_is_made_for_the_deployment_that_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @fl.task
    def where() -> str:
        return sys.prefix

    monkeypatch.setenv("FIELDLAB_CACHE", str(tmp_path / "cache"))
    with fl.DAG("d") as dag:
        where()
    run = fl.run(fl.Experiment("e").map(dag, fl.Node.dummy("a"), env=fl.Venv()))
    assert run.results["a"]["where"].value.startswith(str(tmp_path / "cache"))


def test_an_environment_that_cannot_be_made_fails_the_deployment_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @fl.task(packages=[str(tmp_path / "there-is-no-such-package")])
    def needs() -> None:
        pass

    monkeypatch.setenv("FIELDLAB_CACHE", str(tmp_path / "cache"))
    with fl.DAG("d") as dag:
        needs()
    results = fl.run(dag)
    assert (results.state, results.reason) == (fl.DeploymentState.FAILED, fl.Reason.PREPARE_FAILED)
    assert "there-is-no-such-package" in results.message
    assert results["needs"].status is fl.StepState.CANCELLED


def test_an_executor_that_is_killed_fails_its_deployment_and_no_other() -> None:
    with fl.DAG("one") as one:
        pid_of_me()
    with fl.DAG("two") as two:
        add(1, 1).after(fl.wait_for("go"))
    experiment = fl.Experiment("e").map(one, fl.Node.dummy("a")).map(two, fl.Node.dummy("b"))
    run = fl.run(experiment, wait=False)
    task_pid = run.events.wait("pid", timeout=60)[0].data
    executor = next(one for one in run._source._carrier._executors.values() if one.name == "a")  # type: ignore[attr-defined]
    executor.process.send_signal(signal.SIGKILL)
    run.events.wait("fieldlab.deployment", where=lambda e: e.data["state"] == "failed", timeout=60)
    run.events.send("go")
    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    results = run.results
    assert results["a"].reason is fl.Reason.EXECUTOR_LOST
    assert "signal 9" in results["a"].message
    assert results["a"]["pid_of_me"].status is fl.StepState.FAILED
    assert results["b"]["add"].value == 2
    deadline = time.monotonic() + 30
    while not gone(task_pid):
        assert time.monotonic() < deadline, "the task outlived its executor"
        threading.Event().wait(0.05)
    run.close()


def test_the_folder_goes_with_the_handle_unless_it_was_given(tmp_path: Path) -> None:
    with fl.DAG("d") as dag:
        add(1, 1)
    experiment = fl.Experiment("e").map(dag, fl.Node.dummy("a"))
    kept = fl.run(experiment, folder=tmp_path / "kept")
    kept.close()
    assert (tmp_path / "kept" / "deployments" / "a" / "launch.json").stat().st_mode & 0o777 == 0o600
    other = fl.run(experiment)
    folder = other._source._folder  # type: ignore[attr-defined]
    assert folder.is_dir()
    other.close()
    assert not folder.exists()


def test_progress_is_shown_when_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with fl.DAG("d") as dag:
        add(1, 2)
    fl.run(dag, watch=True)
    assert "localhost/add: succeeded, 3" in capsys.readouterr().out


def test_what_cannot_run_is_told_at_once() -> None:
    with fl.DAG("d") as dag:
        add(threading.Lock(), 1)
    with pytest.raises(fl.PlanError, match="lock"):
        fl.run(dag)
    with pytest.raises(fl.DefinitionError):
        fl.run(add)  # type: ignore[call-overload]


SCRIPT = """
import signal, sys, threading, os
import fieldlab as fl
import helper_of_script

@fl.task
def sleeper(*, ctx: fl.TaskContext) -> None:
    helper_of_script.say(ctx)
    ctx.stopping.wait()

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
    with fl.DAG("d") as dag:
        sleeper()
    run = fl.run(fl.Experiment("e").map(dag, fl.Node.dummy("a")), wait=False)
    print(run.events.wait("pid", timeout=60)[0].data, flush=True)
    try:
        run.wait()
    finally:
        run.close()
"""
HELPER = "import os\n\ndef say(ctx):\n    ctx.events.send('pid', os.getpid())\n"


@pytest.fixture
def script(tmp_path: Path) -> Any:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "helper_of_script.py").write_text(HELPER)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )
    yield process
    process.kill()
    process.wait()


def await_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < deadline, "a process was left behind"
        threading.Event().wait(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind_when_the_program_is_ended(script: Any, number: signal.Signals) -> None:
    pid = int(script.stdout.readline())
    script.send_signal(number)
    script.wait(60)
    await_gone(pid)


# --- when it starts, and what is left of an executor that dies --------------------------------------------------------


def in_an_hour() -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)


def two(dag: fl.DAG, **settings: Any) -> fl.Experiment:
    """Two deployments: ``b`` wants an environment that cannot be made here."""
    kinds = ["host", "container"]
    made = fl.Experiment("e", **settings).map(dag, fl.Node.dummy("a"))
    return made.map(dag, fl.Node.dummy("b", environments=kinds), env=fl.Container(image="none"))


CLOCKS = 0.1  # seconds by which clocks that are compared over a socket may seem to differ


def test_all_nodes_begin_together_when_the_last_of_them_could() -> None:
    with fl.DAG("d") as dag:
        add(1, 2)
    nodes = [fl.Node.dummy(name) for name in "abc"]
    run = fl.run(fl.Experiment("e").map(dag, nodes))
    began = [run.results[name]["add"].started or 0.0 for name in "abc"]
    states = [event.data for event in run.events.stream(timeout=30) if event.name in (START, DEPLOYMENT)]
    (order,) = [at for at, data in enumerate(states) if "at" in data]
    assert sum(data.get("state") == "running" for data in states[:order]) == 3
    assert min(began) >= states[order]["at"] - CLOCKS
    assert run.info.started == states[order]["at"]


def test_an_experiment_starts_at_its_time() -> None:
    with fl.DAG("d") as dag:
        add(1, 2)
    at = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1.5)
    run = fl.run(fl.Experiment("e", start_at=at).map(dag, fl.Node.dummy("a")))
    started = run.results["a"]["add"].started
    assert started is not None
    assert started >= at.timestamp() - CLOCKS
    assert run.state is fl.ExperimentState.SUCCEEDED


def test_one_that_waits_for_its_time_can_be_cancelled_and_has_launched_nothing(tmp_path: Path) -> None:
    with fl.DAG("d") as dag:
        add(1, 2)
    experiment = fl.Experiment("e", start_at=in_an_hour()).map(dag, fl.Node.dummy("a"))
    run = fl.run(experiment, folder=tmp_path, wait=False)
    assert run.state is fl.ExperimentState.READY
    run.cancel(reason="changed my mind")
    assert run.wait(timeout=30) is fl.ExperimentState.CANCELLED
    run.close()
    assert not (tmp_path / "deployments").exists()


@pytest.mark.parametrize(
    ("settings", "goes_on"),
    [({}, False), ({"min_nodes": 1}, True), ({"min_nodes": 2}, False), ({"on_prepare_failure": "continue"}, True)],
)
def test_an_experiment_starts_when_enough_could_be_prepared(settings: dict[str, Any], goes_on: bool) -> None:
    with fl.DAG("d") as dag:
        add(1, 2)
    run = fl.run(two(dag, **settings))
    assert run.results["b"].reason is fl.Reason.PREPARE_FAILED
    assert run.state is fl.ExperimentState.FAILED
    if goes_on:
        assert run.results["a"]["add"].value == 3
    else:
        assert run.results["a"].state is fl.DeploymentState.CANCELLED
        assert "min_nodes" in run.results["a"].message
        assert run.results["a"]["add"].attempts == 0


def test_what_a_killed_executor_had_journalled_arrives(tmp_path: Path) -> None:
    fifo = tmp_path / "supervisor"
    os.mkfifo(fifo)

    @fl.task
    def wait(path: str, *, ctx: fl.TaskContext) -> None:
        status = Path(f"/proc/{os.getppid()}/status").read_text()
        Path(path).write_text(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
        ctx.stopping.wait()

    @fl.task
    def say() -> str:
        print("said before it died")
        return "journalled"

    with fl.DAG("d") as dag:
        wait(str(fifo)).after(say())
    experiment = fl.Experiment("e", reporting="silent").map(dag, fl.Node.dummy("a"))  # nothing is sent before its end
    run = fl.run(experiment, folder=tmp_path / "run", wait=False)
    with os.fdopen(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)) as end:
        assert select.select([end], [], [], 60)[0]
        supervisor = int(end.read())
    os.kill(supervisor, signal.SIGKILL)
    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    results = run.results["a"]
    assert results.reason is fl.Reason.EXECUTOR_LOST
    assert "signal 9" in results.message
    assert results["say"].value == "journalled"
    assert [line.text for line in results["say"].logs if line.stream == "stdout"] == ["said before it died"]
    assert results["wait"].attempts == 1
    run.close()


# --- secrets ----------------------------------------------------------------------------------------------------------


@fl.task(env={"TOKEN": fl.secret("token")})
def reads_its_environment() -> int:
    subprocess.run(["sh", "-c", "echo it is $TOKEN"], check=True)
    return len(os.environ["TOKEN"])


@fl.task
def takes(text: str) -> int:
    print(f"got {text}", end="", flush=True)
    return len(text)


@fl.task
def returns(text: str) -> dict[str, str]:
    return {"it": text}


@fl.task
def raises(text: str) -> None:
    raise ValueError(f"{text} is no number")


@fl.task
def tells(text: str, *, ctx: fl.TaskContext) -> None:
    ctx.events.send("told", {"it": text})


def test_a_secret_reaches_its_task_and_nothing_else(tmp_path: Path) -> None:
    hush = fl.secret("token")
    with fl.DAG("d", stop_on_failure=False) as dag:
        reads_its_environment(), takes(hush), returns(hush), raises(hush), tells(hush)
    results = fl.run(dag, secrets={"token": "hush-hush-1"}, folder=tmp_path)
    assert results["reads_its_environment"].value == results["takes"].value == 11
    assert "".join(line.text for line in results["takes"].logs) == "got ***"
    assert "it is ***" in "".join(line.text for line in results["reads_its_environment"].logs)
    assert results["returns"].reason is fl.Reason.BAD_RESULT
    assert "'token'" in results["returns"].message
    assert "ValueError: *** is no number" in (results["raises"].error or "")
    assert "'token'" in (results["tells"].error or "")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]


@fl.task
def stores(text: str, *, ctx: fl.TaskContext) -> None:
    ctx.store["key"] = text
    ctx.store["long"] = text * 1000


@fl.task
def hands_out(*, ctx: fl.TaskContext) -> str:
    return str(ctx.store["key"])


@fl.task
def names(text: str, *, ctx: fl.TaskContext) -> None:
    for name in (f"{text}.txt", "plain.txt"):
        with open(ctx.artifact(name), "w") as file:
            file.write("x")
    for tell in (lambda: ctx.events.send(text), lambda: ctx.barrier(text)):
        with pytest.raises(fl.DefinitionError, match="the secret 'token'"):
            tell()


def test_a_secret_leaves_by_no_name_and_not_from_the_store(tmp_path: Path) -> None:
    hush = fl.secret("token")
    with fl.DAG("d", stop_on_failure=False) as dag:
        hands_out().after(stores(hush))
        names(hush)
    run = fl.run(fl.Experiment("e").map(dag, fl.Node.dummy("n")), secrets={"token": "hush-hush-1"}, folder=tmp_path)
    results = run.results["n"]
    assert results["stores"].status is results["names"].status is fl.StepState.SUCCEEDED
    assert results["hands_out"].reason is fl.Reason.BAD_RESULT
    assert "'token'" in results["hands_out"].message
    assert [artifact.name for artifact in results["names"].artifacts] == ["plain.txt"]
    assert "its name holds the secret 'token'" in "".join(line.text for line in results["names"].logs)
    told = [path for path in tmp_path.rglob("*") if path.is_file() and b"hush-hush" in path.read_bytes()]
    assert [(path.parent.name, path.parent.stat().st_mode & 0o777) for path in told] == [("values", 0o700)]


def test_a_secret_that_is_not_given_is_missed_before_anything_starts() -> None:
    with fl.DAG("d") as dag:
        takes(fl.secret("token"))
    with pytest.raises(fl.UnknownNameError, match=r"'token'.*secrets=\{"):
        fl.run(dag)


def test_a_secret_goes_through_a_dag_that_is_a_step() -> None:
    with fl.DAG("inner") as inner:
        takes(fl.arg("text"))
    with fl.DAG("outer") as outer:
        inner(text=fl.secret("token"))
    assert fl.run(outer, secrets={"token": "12345"})["inner"].value == 5
