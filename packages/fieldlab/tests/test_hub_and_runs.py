"""A run in memory: what executors report is what readers see. No process is started; the tests speak for executors."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import sys
import threading
import types
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fieldlab import spool
from fieldlab.artifacts import Artifacts, place_of
from fieldlab.hub import Hub
from fieldlab.runs import FEED_PAGES, Run
from fieldlab.ship import pack, step_names
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.dag import DAG
from fieldlab_common.errors import (
    ArtifactNameError,
    BlobMismatch,
    DefinitionError,
    DirectorUnreachable,
    EventTooLarge,
    IllegalState,
    NotFound,
    RunFailed,
    UnknownNameError,
    UntrustedValue,
    WaitTimeout,
)
from fieldlab_common.experiment import Experiment
from fieldlab_common.lifecycle import DeploymentState, ExperimentState, Reason, StepState
from fieldlab_common.node import Node
from fieldlab_common.task import task

D, E = DeploymentState, ExperimentState


@task
def work() -> int:
    return 1


class Actor:
    """An executor as the hub sees it: it claims, reports and sends, one call at a time."""

    def __init__(self, hub: Hub, name: str) -> None:
        self.hub, self.name, self.numbers = hub, name, {"control": 0, "bulk": 0}
        hub.move(name, D.PREPARING, D.READY, D.LAUNCHING)

    def ask(self, endpoint: str, body: bytes = b"", path: Any = None, **query: Any) -> Any:
        answered = self.hub.answer(self.name, endpoint, path or {}, query, body)
        return answered.status, json.loads(
            answered.body
        ) if endpoint != "get_blob" or answered.status >= 300 else answered.body

    def claim(self, journal: str = "j") -> Any:
        return self.ask("claim", wire.dumps(p.ClaimRequest(journal_id=journal, epoch=1)))

    def report(self, *bodies: Any, lane: str = "control", journal: str = "j") -> Any:
        frames = b""
        for body in bodies:
            self.numbers[lane] += 1
            kind = next(k for k, cls in p.RECORDS.items() if cls is type(body))
            frames += wire.frame(self.numbers[lane], wire.dumps(p.Record(kind=kind, at=1.0, body=wire.encode(body))))
        return self.ask("report", frames, lane=lane, journal=journal)

    def end(self, state: DeploymentState = D.SUCCEEDED, reason: Reason = Reason.COMPLETED, bulk: int = 0) -> None:
        self.report(p.Ended(state=state, reason=reason, bulk=bulk))

    def artifact(self, name: str, data: bytes, *, announced: bytes | None = None) -> str:
        digest = hashlib.sha256(data if announced is None else announced).hexdigest()
        self.report(p.ArtifactRecord(step="work", name=name, size=len(data), sha256=digest))
        return digest


class Stage:
    def __init__(self, tmp_path: Path, *nodes: str) -> None:
        with DAG("d") as dag:
            work()
        experiment = Experiment("exp").map(dag, [Node.dummy(name) for name in nodes])
        shipment = pack(experiment)
        self.woken = 0
        self.hub = Hub(shipment.order(), tmp_path / "blobs", woken=self._wake, clock=lambda: 5.0)
        self.actors = [Actor(self.hub, name) for name in nodes]
        self.run = Run(_Source(self.hub), self.hub.info(), steps=step_names(shipment))

    def _wake(self) -> None:
        self.woken += 1


class _Source:
    """The hub, with what only the owner of the executors adds."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    def cancel(self, reason: str, deployments: Any) -> p.ExperimentInfo:
        self._hub.cancel(reason, deployments)
        return self._hub.info()

    def close(self) -> None:
        pass


@pytest.fixture
def one(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, "a")
    stage.actors[0].claim()
    return stage


@pytest.fixture
def two(tmp_path: Path) -> Stage:
    stage = Stage(tmp_path, "a", "b")
    for actor in stage.actors:
        actor.claim("j-" + actor.name)
    return stage


SUCCEEDED = p.StepRecord(
    step="work", state=StepState.SUCCEEDED, settled=True, value=p.ValueRef(json=1, summary="1"), started=1.0, ended=2.0
)


# --- from start to end ------------------------------------------------------------------------------------------------


def test_what_an_executor_reports_is_what_the_run_shows(one: Stage) -> None:
    one.actors[0].report(p.StepRecord(step="work", state=StepState.RUNNING))
    assert one.run.results["a"]["work"].status is StepState.RUNNING
    one.actors[0].report(SUCCEEDED)
    one.actors[0].end()
    assert one.run.wait(timeout=5) is E.SUCCEEDED
    assert one.run.results["a"]["work"].value == 1


def test_a_claim_is_given_once(one: Stage) -> None:
    assert one.actors[0].claim("another")[1]["code"] == "claim_refused"
    assert one.actors[0].claim("j")[0] == 200


def test_records_that_are_sent_again_are_taken_once(one: Stage) -> None:
    one.actors[0].report(SUCCEEDED)
    one.actors[0].numbers["control"] = 0
    assert one.actors[0].report(SUCCEEDED)[1] == {"acked": 1}
    assert len(one.hub.records(p.Lane.CONTROL, 0, 0).records) == 1


def test_reports_of_another_journal_are_refused(one: Stage) -> None:
    assert one.actors[0].report(SUCCEEDED, journal="stranger")[1]["code"] == "claim_refused"


def test_a_large_blob_is_asked_for_in_pieces(one: Stage) -> None:
    digest = one.actors[0].claim()[1]["deployment"]["graph"]
    _, whole = one.actors[0].ask("get_blob", path={"digest": digest})
    pieces = [one.actors[0].ask("get_blob", path={"digest": digest}, offset=at, limit=7)[1] for at in (0, 7)]
    assert hashlib.sha256(whole).hexdigest() == digest
    assert pieces == [whole[:7], whole[7:14]]


def test_an_executor_may_ask_nothing_that_is_a_users(one: Stage) -> None:
    assert one.actors[0].ask("cancel")[0] == 404
    assert one.actors[0].ask("nonsense")[0] == 404


def test_a_deployment_ends_only_when_its_artifacts_are_there(one: Stage) -> None:
    actor = one.actors[0]
    digest = actor.artifact("t.csv", b"data")
    actor.end()
    assert one.run.state is E.RUNNING
    actor.ask("put_blob", b"da", {"digest": digest}, offset=0, size=4)
    actor.ask("put_blob", b"ta", {"digest": digest}, offset=2, size=4)
    assert one.run.state is E.SUCCEEDED
    assert one.run.artifacts.list()[0].read() == b"data"


def test_an_artifact_that_is_given_up_does_not_hold_the_end_back(one: Stage) -> None:
    digest = one.actors[0].artifact("t.csv", b"data")
    one.actors[0].report(p.ArtifactLost(step="work", name="t.csv", reason="disk full", sha256=digest))
    one.actors[0].end()
    assert one.run.state is E.SUCCEEDED
    assert one.run.artifacts.list()[0].lost == "disk full"
    with pytest.raises(NotFound, match="disk full"):
        one.run.artifacts.list()[0].read()


def test_bytes_that_are_not_those_announced_are_refused(one: Stage) -> None:
    digest = one.actors[0].artifact("t", b"data", announced=b"else")
    assert one.actors[0].ask("put_blob", b"data", {"digest": digest}, offset=0, size=4)[1]["code"] == "blob_mismatch"
    assert one.actors[0].ask("blob_status", b"", {"digest": digest})[1] == {"digest": digest}


def test_an_executor_that_dies_fails_its_deployment_and_keeps_what_it_said(two: Stage) -> None:
    two.actors[0].report(SUCCEEDED, journal="j-a")
    two.hub.executor_gone("a", "The executor was ended by signal 9.")
    two.actors[1].report(p.Ended(state=D.SUCCEEDED, reason=Reason.COMPLETED), journal="j-b")
    assert two.run.wait(timeout=5) is E.FAILED
    results = two.run.results
    assert results["a"].reason is Reason.EXECUTOR_LOST
    assert results["a"]["work"].value == 1
    assert results["b"].state is D.SUCCEEDED
    with pytest.raises(RunFailed, match="signal 9"):
        two.run.wait(raise_on_failure=True)


def test_a_cancel_is_told_to_executors_and_ends_as_cancelled(one: Stage) -> None:
    one.run.cancel(reason="wrong site")
    assert one.hub.news("a", 10_000)
    assert one.actors[0].ask("poll", after=0, journal="j")[1]["cancel"] == {"reason": "wrong site"}
    assert not one.hub.news("a", 10_000)
    assert one.run.state is E.CANCELLING
    one.actors[0].end(D.CANCELLED, Reason.CANCELLED)
    assert one.run.wait(timeout=5) is E.CANCELLED


def test_cancelling_one_deployment_leaves_the_others(two: Stage) -> None:
    two.run.cancel(deployments=["a"])
    assert "cancel" in two.actors[0].ask("poll", after=0, journal="j-a")[1]
    assert "cancel" not in two.actors[1].ask("poll", after=0, journal="j-b")[1]
    with pytest.raises(NotFound, match="zzz"):
        two.run.cancel(deployments=["zzz"])


def test_nodes_are_cancelled_with_all_that_is_on_them(two: Stage) -> None:
    two.run.cancel(nodes=Node.dummy("b"))
    assert "cancel" not in two.actors[0].ask("poll", after=0, journal="j-a")[1]
    assert "cancel" in two.actors[1].ask("poll", after=0, journal="j-b")[1]
    two.run.cancel(nodes=["a", "b"])
    assert "cancel" in two.actors[0].ask("poll", after=0, journal="j-a")[1]
    assert two.run.state is E.CANCELLING
    with pytest.raises(UnknownNameError, match="nothing on a node 'c'"):
        two.run.cancel(nodes="c")


def test_waiting_too_long_says_how_it_stands(one: Stage) -> None:
    with pytest.raises(WaitTimeout, match="1 running"):
        one.run.wait(timeout=0)


# --- events -----------------------------------------------------------------------------------------------------------


def test_events_have_one_order_and_one_copy(two: Stage) -> None:
    two.actors[0].report(p.EventRecord(name="hello", data=1, step="work"), journal="j-a")
    sent = two.run.events.send("go", {"rate": 10})
    seen = two.actors[1].ask("poll", after=0, journal="j-b")[1]["events"]
    assert [e["name"] for e in seen if not e["name"].startswith("fieldlab.")] == ["hello", "go"]
    assert [e["number"] for e in seen] == list(range(1, len(seen) + 1))
    assert sent.number == len(seen)
    assert two.hub.send(p.SendEvent(name="go", key=sent.key)) == sent


def test_waiting_for_events_filters_and_counts(two: Stage) -> None:
    for n in range(3):
        two.actors[0].report(p.EventRecord(name="ready", data=n), journal="j-a")
    assert [e.data for e in two.run.events.wait("ready", count=2, where=lambda e: e.data > 0, timeout=5)] == [1, 2]
    assert two.run.events.count("ready") == 3
    last = two.run.events.latest("ready")
    assert last is not None
    assert last.data == 2


def test_a_wait_is_woken_by_the_event(one: Stage) -> None:
    found: list[Any] = []
    waiter = threading.Thread(target=lambda: found.extend(one.run.events.wait("ready", timeout=30)))
    waiter.start()
    one.actors[0].report(p.EventRecord(name="ready", data=7))
    waiter.join(10)
    assert [e.data for e in found] == [7]


def test_a_wait_that_nothing_can_fulfil_any_more_ends_at_once(one: Stage) -> None:
    one.actors[0].end()
    with pytest.raises(WaitTimeout, match="before the run ended"):
        one.run.events.wait("ready")


def test_a_wait_that_takes_too_long_says_what_was_seen(one: Stage) -> None:
    one.run.events.send("raedy")
    with pytest.raises(WaitTimeout, match=r"0 of 2 events 'ready'.*raedy"):
        one.run.events.wait("ready", count=2, timeout=0)


def test_a_stream_ends_with_the_run(one: Stage) -> None:
    one.actors[0].report(p.EventRecord(name="x"))
    one.actors[0].end()
    names = [e.name for e in one.run.events.stream()]
    assert names[-1] == "fieldlab.deployment"
    assert "x" in names


@pytest.mark.parametrize(
    ("data", "error"), [({1, 2}, DefinitionError), (float("nan"), DefinitionError), ("x" * 70_000, EventTooLarge)]
)
def test_data_that_is_no_small_json_is_refused_here(one: Stage, data: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        one.run.events.send("go", data)


def test_reserved_names_and_ended_runs_take_no_events(one: Stage) -> None:
    with pytest.raises(DefinitionError):
        one.run.events.send("fieldlab.barrier")
    one.actors[0].end()
    with pytest.raises(IllegalState):
        one.run.events.send("go")


# --- logs and artifacts -----------------------------------------------------------------------------------------------


def test_logs_are_followed_to_the_end(one: Stage) -> None:
    one.actors[0].report(p.LogRecord(step="work", text="one\ntw"), lane="bulk")
    assert [line.text for line in one.run.logs(step="work")] == ["one", "tw"]
    one.actors[0].report(p.LogRecord(step="work", text="o\n"), lane="bulk")
    one.actors[0].end(bulk=2)
    assert [line.text for line in one.run.logs(follow=True)] == ["one", "two"]
    assert one.run.results["a"]["work"].logs[1].text == "two"


def test_the_log_of_one_deployment_is_read_without_those_of_the_others(
    two: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[p.RecordPage] = []
    read = two.run._source.records
    monkeypatch.setattr(two.run._source, "records", lambda *ask: pages.append(read(*ask)) or pages[-1])
    for text in ("first\n", "second\n"):
        for actor in two.actors:
            actor.report(p.LogRecord(step="work", text=text), lane="bulk", journal=f"j-{actor.name}")
    assert [line.text for line in two.run.logs(node="b")] == ["first", "second"]
    assert {entry.deployment for page in pages for entry in page.records} == {"b"}


def test_logs_are_of_one_node_and_since_a_time(two: Stage) -> None:
    for actor in two.actors:
        actor.report(p.LogRecord(step="work", text=f"on {actor.name}\n"), lane="bulk", journal=f"j-{actor.name}")
    assert [line.text for line in two.run.logs(node="b")] == ["on b"]
    assert [line.text for line in two.run.logs(deployment="a")] == ["on a"]
    assert [line.text for line in two.run.logs(since=1.0)] == ["on a", "on b"]
    assert not two.run.logs(since=1.5)
    for wrong in ({"node": "c"}, {"deployment": "c"}):
        with pytest.raises(UnknownNameError, match="a, b"):
            two.run.logs(**wrong)


def put(actor: Actor, name: str, data: bytes) -> None:
    digest = actor.artifact(name, data)
    actor.ask("put_blob", data, {"digest": digest}, offset=0, size=len(data))


def test_artifacts_land_by_deployment_step_and_attempt(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "out/trace.csv", b"1,2")
    written = one.run.artifacts.download(tmp_path / "out")
    assert written == [tmp_path / "out/a/work/1/out/trace.csv"]
    assert written[0].read_bytes() == b"1,2"


HOSTILE = (
    *(
        "../../evil",
        "/etc/passwd",
        "a/../../b",
        "c:evil",
        "x\\..\\y",
        "a\x00b",
        "",
        ".",
        "..",
        "a//b",
        "a/",
        " a",
        "a\n",
    ),
    *("x" * 5000, "../" * 1600 + "x", "\x1b[2J", "\u202etxt.exe", "ä" * 250),
)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_writes_nothing_and_keeps_nothing_back(one: Stage, tmp_path: Path, name: str) -> None:
    put(one.actors[0], name, b"evil")
    put(one.actors[0], "good.txt", b"good")
    with pytest.raises(ArtifactNameError):
        one.run.artifacts.download(tmp_path / "out")
    files = [f for f in tmp_path.rglob("*") if f.is_file() and "blobs" not in f.parts]
    assert files == [tmp_path / "out/a/work/1/good.txt"]


def test_artifacts_with_hostile_names_are_listed_harmlessly(one: Stage) -> None:
    for name in (*HOSTILE, "<script>alert(1)</script>"):
        one.actors[0].report(p.ArtifactRecord(step="<b>\x1b", name=name, size=1, sha256="0" * 64))
    for shown in (repr(one.run.artifacts), one.run.artifacts._repr_html_(), str(one.run.artifacts.list()[-1])):
        assert not {"\x1b", "\x00", "\u202e"} & set(shown)
    assert "<script" not in one.run.artifacts._repr_html_()
    assert max(map(len, repr(one.run.artifacts).splitlines())) < 400


@pytest.mark.parametrize("name", ["NUL", "aux.csv", "out/COM1.txt", "lpt9", "con.tar.gz", "x."])
def test_names_that_windows_takes_for_devices_are_refused_there_alone(one: Stage, name: str) -> None:
    put(one.actors[0], name, b"x")
    (file,) = one.run.artifacts.list()
    assert place_of(file, "posix") == f"a/work/1/{name}"
    with pytest.raises(ArtifactNameError, match=r"download\(path\)"):
        place_of(file, "nt")


def test_a_director_cannot_choose_where_a_download_is_kept_either(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "x", b"data")
    wrong = dataclasses.replace(one.run.artifacts.list()[0], sha256="../../../evil/0123456789")
    with pytest.raises(BlobMismatch, match="no SHA-256"):
        wrong.download(tmp_path / "x")


def test_artifacts_are_chosen_by_name(one: Stage, tmp_path: Path) -> None:
    for name in ("a.pcap", "out/b.pcap", "c.csv"):
        put(one.actors[0], name, name.encode())
    assert [file.name for file in one.run.artifacts.list(name="*.pcap")] == ["a.pcap", "out/b.pcap"]
    assert [path.name for path in one.run.artifacts.download(tmp_path, name="c.*")] == ["c.csv"]


def test_a_link_in_the_folder_does_not_lead_outside(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "sub/x", b"data")
    (tmp_path / "out/a/work/1").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/a/work/1/sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactNameError, match="outside"):
        one.run.artifacts.download(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_names_of_which_one_is_the_others_folder_are_told(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "x", b"file")
    put(one.actors[0], "x/y", b"below it")
    with pytest.raises(ArtifactNameError, match="another stands in its place"):
        one.run.artifacts.download(tmp_path / "out")


class Counting:
    """The hub, telling from where blobs were read; it may cut or damage what it sends."""

    def __init__(self, hub: Hub, change: Any = None) -> None:
        self._hub, self._change, self.offsets = hub, change, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    def blob(self, digest: str, offset: int) -> Any:
        self.offsets.append(offset)
        for chunk in self._hub.blob(digest, offset):
            yield self._change(chunk) if self._change else chunk


def test_a_download_continues_where_it_was_cut(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "big", b"0123456789")
    cut = Artifacts(Counting(one.hub, lambda chunk: chunk[:4]))  # type: ignore[arg-type]
    source = Counting(one.hub)
    target = tmp_path / "big"
    part = tmp_path / f".big.{hashlib.sha256(b'0123456789').hexdigest()[:16]}.part"
    part.write_bytes(b"0123")
    assert Artifacts(source).list()[0].download(target).read_bytes() == b"0123456789"  # type: ignore[arg-type]
    assert source.offsets == [4]
    with pytest.raises(BlobMismatch):
        cut.list()[0].read()


def test_two_downloads_of_one_file_at_once_are_both_right(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "big", b"0123456789")
    inner: list[bytes] = []

    def meanwhile(chunk: bytes) -> bytes:
        if not inner:
            inner.append(b"")
            inner[0] = one.run.artifacts.list()[0].download(tmp_path / "big").read_bytes()
        return chunk

    outer = Artifacts(Counting(one.hub, meanwhile)).list()[0]  # type: ignore[arg-type]
    assert outer.download(tmp_path / "big").read_bytes() == inner[0] == b"0123456789"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["big"]


def test_a_file_that_is_there_is_replaced_only_by_a_whole_one(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "big", b"0123456789")
    (tmp_path / "big").write_bytes(b"of an earlier run")

    def breaks(chunk: bytes) -> bytes:
        raise DirectorUnreachable("The line was cut.")

    with pytest.raises(DirectorUnreachable):
        Artifacts(Counting(one.hub, breaks)).list()[0].download(tmp_path / "big")  # type: ignore[arg-type]
    assert (tmp_path / "big").read_bytes() == b"of an earlier run"
    assert one.run.artifacts.list()[0].download(tmp_path / "big").read_bytes() == b"0123456789"


def test_damaged_bytes_are_never_left_under_the_artifacts_name(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "big", b"0123456789")
    damaged = Artifacts(Counting(one.hub, lambda chunk: chunk.replace(b"5", b"6")))  # type: ignore[arg-type]
    with pytest.raises(BlobMismatch):
        damaged.list()[0].download(tmp_path / "big")
    assert not (tmp_path / "big").exists()
    assert one.run.artifacts.list()[0].download(tmp_path / "big").read_bytes() == b"0123456789"


def test_what_is_there_already_is_not_fetched_again(one: Stage, tmp_path: Path) -> None:
    put(one.actors[0], "big", b"0123456789")
    one.run.artifacts.download(tmp_path)
    source = Counting(one.hub)
    Artifacts(source).download(tmp_path)  # type: ignore[arg-type]
    assert source.offsets == []


def test_an_iterations_artifact_lands_under_its_iteration(one: Stage) -> None:
    one.actors[0].report(p.ArtifactRecord(step="work", name="x", size=0, sha256="0" * 64, attempt=2, iteration=7))
    assert place_of(one.run.artifacts.list()[0]) == "a/work/7/x"


# --- watching ---------------------------------------------------------------------------------------------------------


def test_watching_writes_a_line_for_each_change_and_the_log(one: Stage) -> None:
    actor, out = one.actors[0], io.StringIO()
    actor.report(p.LogRecord(step="work", text="hello \x1b[2J\n"), lane="bulk")
    actor.report(SUCCEEDED)
    actor.end(bulk=1)
    assert one.run.watch(file=out) is E.SUCCEEDED
    text = out.getvalue()
    assert "exp is succeeded" in text
    assert "a/work: succeeded, 1" in text
    assert "[a/work] hello \\x1b[2J\n" in text


def test_interrupting_a_watch_leaves_the_run_going(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> Any:
        raise KeyboardInterrupt

    out = io.StringIO()
    monkeypatch.setattr(one.run, "refresh", interrupt)
    one.run.watch(file=out)
    assert "goes on" in out.getvalue()
    assert one.run.state is E.RUNNING


def test_a_terminal_gets_a_table_that_nodes_cannot_drive(one: Stage) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pytest.importorskip("rich")
    one.actors[0].report(p.LogRecord(step="work", text="[bold]x[/bold] \x1b]0;owned\x07\n"), lane="bulk")
    one.actors[0].end()
    out = Terminal()
    one.run.watch(file=out)
    assert "succeeded" in out.getvalue()
    assert "[bold]x[/bold]" in out.getvalue()
    assert "\x1b]0;" not in out.getvalue()


def test_who_watches_or_waits_for_a_run_in_the_line_is_told_for_which_nodes_it_waits(
    one: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [
        p.WaitsFor(node="pi-1", runs=("mine",), others=2),
        p.WaitsFor(node="pi-2", before=1),
        *(p.WaitsFor(node=f"pi-{n}", others=1) for n in range(3, 6)),
    ]
    info = dataclasses.replace(one.run.info, state=E.PREPARING, waits_for=tuple(held))
    infos = [info, dataclasses.replace(info, state=E.CANCELLED, waits_for=())]
    monkeypatch.setattr(one.hub, "info", lambda: infos.pop(0) if len(infos) > 1 else infos[0])
    said = (
        "waits for pi-1 (held by your run 'mine' and 2 runs of others), pi-2 (1 run before this one in line), "
        "pi-3 (held by 1 run of others), 2 more"
    )
    out = io.StringIO()
    one.run.watch(file=out, logs=False)
    assert f"exp is preparing, and {said}\n" in out.getvalue()
    assert "exp is cancelled\n" in out.getvalue()
    infos[:] = [info]
    with pytest.raises(WaitTimeout) as caught:
        one.run.wait(timeout=0)
    assert f"1 running; it {said}." in str(caught.value)


def test_a_dumb_terminal_gets_lines(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    one.actors[0].end()
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    one.run.watch(file=out)
    assert "exp is succeeded" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_a_pipe_that_nobody_reads_any_more_ends_the_watching(one: Stage) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as out:
        assert one.run.watch(file=out) is E.RUNNING
        with contextlib.suppress(BrokenPipeError):
            out.close()
    assert one.run.state is E.RUNNING


def test_what_a_terminal_has_no_letters_for_is_written_out(one: Stage) -> None:
    one.actors[0].report(p.LogRecord(step="work", text="größer – 測定\n"), lane="bulk")
    one.actors[0].end(bulk=1)
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    one.run.watch(file=out)
    assert b"[a/work] gr\\xf6\\xdfer \\u2013" in raw.getvalue()


def test_a_notebook_gets_one_table_that_is_replaced(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handle:
        pages: ClassVar[list[str]] = []

        def update(self, page: str) -> None:
            self.pages.append(page)

    shell = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=1))
    display = types.SimpleNamespace(HTML=str, display=lambda page, display_id: Handle())
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    one.actors[0].report(p.LogRecord(step="work", text="<script>\x1b[2J\n"), lane="bulk")
    one.actors[0].end()
    assert one.run.watch() is E.SUCCEEDED
    assert "<td>succeeded</td>" in Handle.pages[-1]
    assert "[a/work] &lt;script&gt;\\x1b[2J" in Handle.pages[-1]


def test_watching_shows_the_states_before_all_of_a_long_log(one: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "PAGE", 10)
    for n in range(100):
        one.actors[0].report(p.LogRecord(step="work", text=f"line {n}\n"), lane="bulk")
    feed = one.run.log_feed()
    assert len(list(feed(False))) == 10 * FEED_PAGES
    assert [line.text for line in feed(True)][-1] == "line 99"


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_that_read_one_run_take_each_record_once(one: Stage) -> None:
    count, reading = 300, threading.Event()

    def read() -> None:
        reading.wait(30)
        while len(one.run.results["a"]["work"].history) < count:
            one.run.results.rows()

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    reading.set()
    for n in range(count):
        one.actors[0].report(p.StepRecord(step="work", state=StepState.SUCCEEDED, iteration=n, started=1.0, ended=2.0))
    for reader in readers:
        reader.join(60)
        assert not reader.is_alive()
    assert [row["iteration"] for row in one.run.results.rows()] == list(range(count))


def test_a_fork_while_a_thread_reads_does_not_lock_the_childs_run(one: Stage) -> None:
    with one.run._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if one.run._lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- hostile nodes ----------------------------------------------------------------------------------------------------


class Loud:
    """What prints when its pickle is opened, wherever that is."""

    def __reduce__(self) -> Any:
        return print, ("a pickle was opened",)


def test_a_run_of_hostile_nodes_is_shown_in_every_way_and_does_nothing(
    one: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "<script>alert(1)</script>\x1b[2J\x9b\u202e\x07"
    pickled = base64.b64encode(pickle.dumps(Loud())).decode()
    value = p.ValueRef(format="pickle", data=pickled, size=9, summary=bad)
    actor = one.actors[0]
    actor.report(p.LogRecord(step=bad, text=bad + "\n", stream=bad), lane="bulk")
    actor.report(p.EventRecord(name=bad, data={"x": bad}, step=bad))
    actor.report(p.StepRecord(step="work", state=StepState.FAILED, message=bad, error=bad, started=1e300, ended=-1e300))
    actor.report(
        p.StepRecord(
            step="work", state=StepState.SUCCEEDED, settled=True, attempt=2, started=1.0, ended=2.0, value=value
        )
    )
    actor.report(p.StepRecord(step=bad, state=StepState.FAILED, settled=True, message=bad, started=1.0, ended=2.0))
    actor.report(p.ArtifactRecord(step=bad, name=bad, size=0, sha256="0" * 64))
    actor.report(p.ArtifactLost(step=bad, name=bad, reason=bad, sha256="0" * 64))
    actor.report(p.Ended(state=D.FAILED, reason=Reason.STEP_FAILED, message=bad, bulk=1))
    run, out = one.run, io.StringIO()
    run.watch(file=out)
    results = run.results
    shown = [out.getvalue(), *map(str, run.logs()), str(run.logs()), *map(repr, run.events.stream())]
    things = [
        run,
        run.deployments,
        results,
        results["a"],
        results["a"]["work"],
        run.logs(),
        run.artifacts,
        run.timeline(),
    ]
    things += [results["a"].get(bad, results), run.events.latest(bad), *run.artifacts.list()]
    shown += [repr(thing) for thing in things] + [
        thing._repr_html_() for thing in things if hasattr(thing, "_repr_html_")
    ]
    with pytest.raises(RunFailed) as caught:
        run.wait(raise_on_failure=True)
    shown.append(str(caught.value))
    for text in shown:
        assert not {"\x1b", "\x9b", "\u202e", "\x07"} & set(text), text
        assert "<script" not in text or "<table" not in text, text
    assert not any("<script" in thing._repr_html_() for thing in things if hasattr(thing, "_repr_html_"))
    assert [row["value"] for row in results.rows() if row["step"] == "work"] == [None, None]
    run.artifacts.download(tmp_path / "out")
    assert "opened" not in capsys.readouterr().out
    with pytest.raises(UntrustedValue):
        _ = results["a"]["work"].value
