"""Whatever is killed: nothing that was recorded is lost, nothing is doubled, and everything ends as it should."""

from __future__ import annotations

import collections
import importlib.util
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import fieldlab as fl
import pytest
from fieldlab_common.protocol import Lane, RecordEntry
from fieldlab_director import Embedded, embedded

NODES = [
    {"name": "server", "place": "rack"},
    {"name": "plain", "place": "desk"},
    {"name": "zero-copy", "place": "desk", "sender": "sendfile"},
]
Records = Callable[[fl.Run, Lane], list[RecordEntry]]
Until = Callable[[fl.Run, Callable[[fl.Results], bool]], fl.Results]


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "examples" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_director(tmp_path: Path) -> Iterator[Embedded]:
    with embedded(tmp_path / "director", nodes=NODES) as running:
        yield running


def _nothing_lost_or_doubled(run: fl.Run, records: Records) -> None:
    for lane in Lane:
        numbers: dict[str, list[int]] = collections.defaultdict(list)
        for entry in records(run, lane):
            numbers[entry.deployment].append(entry.number)
        for deployment, found in numbers.items():
            assert found == list(range(1, len(found) + 1)), (lane, deployment)
    settled = collections.Counter(
        (entry.deployment, entry.record.body["step"])
        for entry in records(run, Lane.CONTROL)
        if entry.record.kind == "step" and entry.record.body.get("settled")
    )
    assert set(settled.values()) == {1}
    ends = collections.Counter(e.deployment for e in records(run, Lane.CONTROL) if e.record.kind == "ended")
    assert set(ends.values()) == {1}
    events = list(run.events.stream(timeout=0))
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert len({event.key for event in events}) == len(events)


def test_a_director_killed_amid_the_measurement_and_restarted_loses_and_doubles_nothing(
    own_director: Embedded, quickstart: ModuleType, records: Records, until: Until, tmp_path: Path
) -> None:
    client = fl.Client(own_director.url, token=own_director.token)
    run = client.submit(quickstart.define(client.nodes(), exchanges=2000, seconds=4.0))
    measuring = fl.StepState.RUNNING
    until(run, lambda r: any(r[name]["throughput"].status is measuring for name in ("plain", "zero-copy")))
    own_director.kill()
    own_director.restart()

    assert run.wait(timeout=90) is fl.ExperimentState.SUCCEEDED
    _nothing_lost_or_doubled(run, records)
    for name in ("plain", "zero-copy"):
        assert run.results[name]["round_trips"].value["exchanges"] == 2000
        assert run.results[name]["throughput"].value["seconds"] >= 4
    assert len(list(run.logs(step="throughput"))) == 2
    events = collections.Counter((event.name, event.sender, event.step) for event in run.events.stream(timeout=0))
    assert events["measured", "plain", "send"] == events["measured", "zero-copy", "send"] == 1
    assert events["fieldlab.barrier", "server", "start"] == 1
    assert len(run.artifacts.download(tmp_path / "out")) == 6


@fl.task
def begin() -> int:
    print("begun")
    return 41


@fl.task
def hold(value: int, *, ctx: fl.TaskContext) -> int:
    print("holding", flush=True)
    ctx.events.send("holding", {"pid": os.getpid()})
    ctx.events.wait("go", timeout=100)
    return value + 1


def test_an_executor_that_is_killed_fails_its_deployment_alone_and_what_it_had_recorded_is_kept(
    client: fl.Client, name: str, records: Records, alive: Callable[[int], bool]
) -> None:
    with fl.DAG("held") as dag:
        hold(begin())
    run = client.submit(fl.Experiment(name).map(dag, client.nodes()))
    pids = {event.sender: event.data["pid"] for event in run.events.wait("holding", count=3, timeout=60)}
    started = {e.deployment: e.record.body["pid"] for e in records(run, Lane.CONTROL) if e.record.kind == "started"}
    os.kill(started["b"], signal.SIGKILL)
    run.events.wait("fieldlab.deployment", where=lambda e: e.data["state"] == "failed", timeout=60)
    run.events.send("go")

    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    results = run.results
    assert [results[node].state for node in "abc"] == ["succeeded", "failed", "succeeded"]
    assert results["b"].reason is fl.Reason.EXECUTOR_LOST
    assert results["b"].message
    assert results["b"]["begin"].value == 41
    assert "begun" in str(results["b"]["begin"].logs)
    assert results["b"]["hold"].status is fl.StepState.FAILED
    assert results["a"]["hold"].value == results["c"]["hold"].value == 42
    assert not alive(pids["b"])


@fl.task
def kill_itself() -> str:
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


@fl.task
def exit_well() -> str:
    os._exit(0)


@pytest.mark.parametrize(
    ("task", "reason"), [(kill_itself, fl.Reason.SIGNAL), (exit_well, fl.Reason.EXITED)], ids=["SIGKILL", "_exit(0)"]
)
@pytest.mark.parametrize("where", ["here", "director"])
def test_a_task_whose_process_ends_without_a_result_has_failed(
    client: fl.Client, name: str, task: fl.Task[str], reason: fl.Reason, where: str
) -> None:
    with fl.DAG("dying") as dag:
        task().named("dies")
    exp = fl.Experiment(name).map(dag, client.nodes()["a"])
    run = client.submit(exp) if where == "director" else fl.run(exp)
    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    step = run.results["a"]["dies"]
    assert (step.status, step.reason) == (fl.StepState.FAILED, reason)
    assert run.results["a"].reason is fl.Reason.STEP_FAILED
    with pytest.raises(fl.StepFailed):
        _ = step.value


def test_an_event_that_is_sent_before_the_start_reaches_the_tasks(client: fl.Client, name: str) -> None:
    with fl.DAG("early") as dag:
        fl.wait_for("early", timeout=60)
    run = client.prepare(fl.Experiment(name).map(dag, client.nodes()))
    run.events.send("early", {"n": 1})
    assert run.start().wait(timeout=60) is fl.ExperimentState.SUCCEEDED
    assert [run.results[node]["wait_for"].value for node in "abc"] == [{"n": 1}] * 3


@fl.task
def stay(value: int, there: str) -> int:
    with open(there, "w") as pipe:
        pipe.write(str(os.getppid()))
    signal.pause()
    return value


def _connector_of(director: Embedded) -> int:
    children = Path(f"/proc/{director.pid}/task/{director.pid}/children").read_text().split()
    return next(int(pid) for pid in children if b"connectors.host" in Path(f"/proc/{pid}/cmdline").read_bytes())


def test_what_a_killed_executor_left_is_shipped_by_hand(own_director: Embedded, tmp_path: Path, until: Until) -> None:
    there = tmp_path / "there"
    os.mkfifo(there)
    with fl.DAG("rescued") as dag:
        stay(begin(), str(there))
    client = fl.Client(own_director.url, token=own_director.token)
    run = client.submit(fl.Experiment("rescued", reporting="silent").map(dag, client.nodes()["plain"]))
    spawner = int(there.read_text())
    executor = int(Path(f"/proc/{spawner}/stat").read_text().rpartition(")")[2].split()[1])
    launch = next(own_director.folder.rglob("launch.json"))
    assert run.results["plain"]["begin"].status is fl.StepState.WAITING  # it has said nothing yet

    connector = _connector_of(own_director)
    os.kill(connector, signal.SIGSTOP)  # it would drain by itself
    try:
        ended = os.pidfd_open(executor)
        os.kill(executor, signal.SIGKILL)
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)
        executable = next(own_director.folder.rglob("fieldlab.pyz"))
        command = [sys.executable, str(executable), "drain", str(launch.parent)]
        drained = subprocess.run(command, capture_output=True, text=True, timeout=60)
    finally:
        os.kill(connector, signal.SIGCONT)
    assert drained.returncode == 0, drained.stderr
    run.wait(timeout=60)
    results = run.results
    assert results["plain"]["begin"].value == 41
    assert "begun" in str(results["plain"]["begin"].logs)
