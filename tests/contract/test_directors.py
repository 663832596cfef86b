"""What a director answers a client: the fake one of ``fieldlab.testing`` and a real one are held to the same.

Each test runs against both, through the real client: the fake in memory, its tasks played; the real in a process of
its own, over HTTP, with executors. A test that needs a run to be under way has it wait at a gate.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fieldlab as fl
import pytest
from fieldlab.fake import ENDPOINTS as FAKED
from fieldlab.testing import FakeDirector
from fieldlab.transport import Session, check
from fieldlab_common import protocol as p
from fieldlab_director import embedded

NODES = [{"name": "a", "site": "lab"}, {"name": "b", "site": "roof"}]
# What the fake has no answer for, and why nobody who tests a program misses it.
NOT_FAKED = {
    "executable": "there are no nodes that would fetch it",
    **dict.fromkeys(
        ("login", "logout", "change_password", "tokens", "create_token", "revoke_token"),
        "it has one user, with one token",
    ),
    **dict.fromkeys(
        ("join_token", "agents", "remove_agent", "join", "authority", "renew_agent"), "no machine can join it"
    ),
    **dict.fromkeys(
        ("users", "add_user", "change_user", "remove_user", "share_infrastructure", "unshare_infrastructure"),
        "it has one user",
    ),
}
_number = itertools.count(1)


@fl.task
def add(a: int, b: int) -> int:
    print("adding", a, b)
    return a + b


@fl.task
def fails(*, ctx: fl.TaskContext) -> int:
    raise ValueError("no route to host")


STAND_INS = {"add": lambda a, b: a + b, "fails": ValueError("no route to host")}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with embedded(tmp_path_factory.mktemp("director"), nodes=NODES) as director:
        yield director


@pytest.fixture(params=["fake", "real"])
def client(request: pytest.FixtureRequest) -> Iterator[fl.Client]:
    if request.param == "fake":
        with FakeDirector(NODES, stand_ins=STAND_INS) as director, director.client() as made:
            yield made
    else:
        director = request.getfixturevalue("real")
        with fl.Client(director.url, director.token) as made:
            yield made


@pytest.fixture
def stranger(client: fl.Client, request: pytest.FixtureRequest) -> fl.Client:
    """A client with a token that nobody has."""
    moved = client._session._transport
    return fl.Client(client.endpoint, "flu_nobodys", transport=moved)


def name() -> str:
    return f"e{next(_number)}"


def sums(client: fl.Client, called: str = "", *, gated: bool = False) -> fl.Experiment:
    """Two nodes, each adds; gated: when somebody has said go."""
    with fl.DAG("sums") as dag:
        total = add(add(1, 2), 3).named("total")
        if gated:
            fl.wait_for("go", timeout=600) >> dag["add"]
        fl.send("done").after(total)
    return fl.Experiment(called or name()).map(dag, client.nodes().where(fl.node["site"].exists()), role="client")


def session(client: fl.Client) -> Session:
    return client._session


# --- which endpoints --------------------------------------------------------------------------------------------------


def test_the_fake_answers_everything_that_a_user_may_ask() -> None:
    machines = {p.Caller.EXECUTOR, p.Caller.UPLOADER, p.Caller.AGENT}
    users = {row.name for row in p.ENDPOINTS.values() if not set(row.callers) <= machines}
    assert users - set(FAKED) == set(NOT_FAKED)


# --- who and what is there --------------------------------------------------------------------------------------------


def test_who_and_what_is_there(client: fl.Client) -> None:
    assert client.health().status == "ok"
    assert client.health().protocols == p.PROTOCOLS
    assert client.whoami().role == "admin"
    nodes = client.nodes()
    assert {"a", "b"} <= set(nodes.names)
    assert nodes.where(fl.node["site"] == "roof").names == ("b",)
    assert nodes["a"].availability is fl.Availability.AVAILABLE


def test_infrastructure_is_tried_node_by_node(client: fl.Client) -> None:
    lab = name()
    client.infrastructures.attach(lab, fl.Local(nodes=[f"{lab}-x"]))
    lines = client.infrastructures.check(lab)
    assert [line for line in lines if line.needed and not line.ok] == []
    assert "executor" in [line.what for line in lines]
    assert "what came back" in repr(lines)
    with pytest.raises(fl.NotFound):
        client.infrastructures.check(name())


def test_infrastructure_says_where_its_executors_reach_the_director(client: fl.Client) -> None:
    made = client.infrastructures.attach(name(), fl.Local(nodes=1), director_url="https://d.example")
    assert made.info.director_url == "https://d.example"


def test_infrastructure_that_is_detached_is_gone_and_gives_its_name_back(client: fl.Client) -> None:
    lab = name()
    for _ in range(2):
        made = client.infrastructures.attach(lab, fl.Local(nodes=[f"{lab}-x"]))
        assert f"{lab}-x" in client.nodes().names
        made.detach()
        assert made.info.state == "detached"
        assert f"{lab}-x" not in client.nodes().names
    with pytest.raises(fl.NotFound):
        made.detach()


def test_infrastructure_that_runs_use_goes_when_they_have_ended(client: fl.Client) -> None:
    lab = name()
    made = client.infrastructures.attach(lab, fl.Local(nodes=[f"{lab}-x"]))
    with fl.DAG("d") as dag:
        fl.wait_for("go", timeout=60)
    run = client.submit(fl.Experiment(lab).map(dag, client.nodes().where(fl.node.name == f"{lab}-x")))
    with pytest.raises(fl.IllegalState, match=lab):
        made.detach()
    made.detach(drain=True)
    assert made.info.state == "leaving"
    assert f"{lab}-x" not in client.nodes().names
    run.events.send("go")
    assert run.wait(timeout=60) is fl.ExperimentState.SUCCEEDED
    deadline = time.monotonic() + 60
    while lab in [one.name for one in client.infrastructures.list()]:
        assert time.monotonic() < deadline
        run.refresh(0.1)


def test_infrastructure_is_attached_under_a_name_of_its_own(client: fl.Client) -> None:
    lab = name()
    made = client.infrastructures.attach(lab, fl.Local(nodes=[{"name": f"{lab}-x", "shelf": 3}, f"{lab}-y"]))
    assert (made.name, made.kind, made.info.nodes, made.info.state) == (lab, "local", 2, "ready")
    assert client.nodes()[f"{lab}-x"]["shelf"] == 3
    assert lab in [one.name for one in client.infrastructures.list()]
    with pytest.raises(fl.IllegalState):
        client.infrastructures.attach(lab, fl.Local(nodes=1))
    with pytest.raises(fl.UnknownConnector):
        session(client).call(
            "attach_infrastructure",
            p.InfrastructureInfo,
            body=p.AttachInfrastructure(name=name(), spec=p.Tagged(kind="carrier-pigeon")),
        )


def test_a_token_that_nobody_has_opens_nothing_but_health(stranger: fl.Client) -> None:
    assert stranger.health().status == "ok"
    for ask in (stranger.whoami, stranger.nodes, stranger.experiments, lambda: stranger.run("x")):
        with pytest.raises(fl.AuthenticationError, match="FIELDLAB_TOKEN"):
            ask()


def test_a_version_that_it_does_not_speak_is_refused(client: fl.Client) -> None:
    with pytest.raises(fl.ProtocolMismatch):
        session(client).call("whoami", p.Principal, headers={"fieldlab-protocol": "999"})


def test_secrets_are_stored_and_never_read(client: fl.Client) -> None:
    stored = name()
    client.secrets.set(stored, "hush")
    client.secrets.set(stored, "hush hush")
    assert [one.name for one in client.secrets.list()].count(stored) == 1
    assert "hush" not in repr(client.secrets)
    client.secrets.delete(stored)
    assert stored not in [one.name for one in client.secrets.list()]
    with pytest.raises(fl.NotFound):
        client.secrets.delete(stored)
    with pytest.raises(fl.InvalidRequest):
        client.secrets.set(stored, "")


# --- blobs ------------------------------------------------------------------------------------------------------------


def put(client: fl.Client, data: bytes, offset: int, size: int, digest: str = "") -> p.BlobStatus:
    digest = digest or hashlib.sha256(data).hexdigest()
    query = {"offset": offset, "size": size}
    return session(client).call("put_blob", p.BlobStatus, path={"digest": digest}, query=query, body=data)


def read(client: fl.Client, digest: str, offset: int = 0) -> tuple[int, bytes]:
    with session(client).stream("get_blob", path={"digest": digest}, offset=offset) as stream:
        check(p.ENDPOINTS["get_blob"], stream.answer, client.endpoint)
        return stream.answer.status, b"".join(stream.chunks)


def test_a_blob_goes_up_in_parts_and_comes_down_from_any_offset(client: fl.Client) -> None:
    data = name().encode() * 100
    digest, half = hashlib.sha256(data).hexdigest(), len(data) // 2
    missing = p.BlobList(digests=(digest,))
    assert session(client).call("missing_blobs", p.BlobList, body=missing).digests == (digest,)
    assert put(client, data[:half], 0, len(data), digest) == p.BlobStatus(digest=digest, offset=half)
    with pytest.raises(fl.BlobMismatch):
        put(client, data[half:], half + 1, len(data), digest)
    assert session(client).call("blob_status", p.BlobStatus, path={"digest": digest}).offset == half
    assert put(client, data[half:], half, len(data), digest).complete
    assert session(client).call("missing_blobs", p.BlobList, body=missing).digests == ()
    assert read(client, digest) == (200, data)
    assert read(client, digest, 7) == (206, data[7:])


def test_bytes_that_are_not_what_they_are_called_are_refused(client: fl.Client) -> None:
    digest = hashlib.sha256(name().encode()).hexdigest()
    with pytest.raises(fl.BlobMismatch):
        put(client, b"something else", 0, 14, digest)
    with pytest.raises(fl.NotFound):
        read(client, digest)
    with pytest.raises(fl.InvalidRequest):
        put(client, b"x", 0, 1, "no-digest")


def test_a_range_beyond_the_end_is_refused(client: fl.Client) -> None:
    data = name().encode()
    put(client, data, 0, len(data))
    with pytest.raises(fl.DirectorError):
        read(client, hashlib.sha256(data).hexdigest(), len(data) + 5)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_from_submit_to_results(client: fl.Client) -> None:
    run = client.submit(sums(client))
    assert run.wait(timeout=100, raise_on_failure=True) is fl.ExperimentState.SUCCEEDED
    results = client.run(run.name).results
    assert list(results) == ["a", "b"]
    assert [results[one]["total"].value for one in results] == [6, 6]
    rows = [(row["deployment"], row["step"], row["value"]) for row in results.rows() if row["step"] != "send"]
    assert rows == [("a", "add", 3), ("a", "total", 6), ("b", "add", 3), ("b", "total", 6)]
    info = run.info
    assert info.created <= (info.started or 0) <= (info.ended or 0)
    assert {one.role for one in run.deployments.values()} == {"client"}
    assert all(one.reason is fl.Reason.COMPLETED and one.drained for one in run.deployments.values())
    assert run.artifacts.list() == []


def test_a_run_that_fails_says_why(client: fl.Client) -> None:
    with fl.DAG("d") as dag:
        add(fails(), 1)
    run = client.submit(fl.Experiment(name()).map(dag, client.nodes()["a"]))
    assert run.wait(timeout=100) is fl.ExperimentState.FAILED
    results = run.results["a"]
    assert (results.state, results.reason) == (fl.DeploymentState.FAILED, fl.Reason.STEP_FAILED)
    assert (results["fails"].status, results["fails"].reason) == (fl.StepState.FAILED, fl.Reason.RAISED)
    assert "no route to host" in results["fails"].error
    assert (results["add"].status, results["add"].reason) == (fl.StepState.CANCELLED, fl.Reason.STOP_ON_FAILURE)
    with pytest.raises(fl.RunFailed, match="no route to host"):
        run.wait(raise_on_failure=True)


def test_events_have_one_order_and_open_gates(client: fl.Client) -> None:
    run = client.submit(sums(client, gated=True))
    sent = run.events.send("go", {"rate": 10})
    assert run.wait(timeout=100) is fl.ExperimentState.SUCCEEDED
    done = run.events.wait("done", count=2, timeout=30)
    assert {event.sender for event in done} == {"a", "b"}
    events = list(run.events.stream())
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert events[(sent.number or 0) - 1].data == {"rate": 10}
    assert sent.number < done[0].number < done[1].number  # type: ignore[operator]
    latest = run.events.latest("done")
    assert (run.events.count("done"), latest.number if latest else 0) == (2, done[1].number)
    states = [(e.data["deployment"], e.data["state"]) for e in events if e.name == "fieldlab.deployment"]
    for one in ("a", "b"):
        mine = [state for deployment, state in states if deployment == one]
        assert mine == ["preparing", "ready", "launching", "running", "succeeded"]
    with pytest.raises(fl.IllegalState):
        run.events.send("go")


def test_an_event_with_a_key_is_sent_once(client: fl.Client) -> None:
    run = client.prepare(sums(client))
    sent = [run._source.send(p.SendEvent(name="go", data=n, key="k1")) for n in range(3)]
    assert {event.number for event in sent} == {sent[0].number}
    assert run.events.count("go") == 1
    with pytest.raises(fl.EventTooLarge):
        run._source.send(p.SendEvent(name="go", data="x" * 70_000))
    for wrong in ("", "fieldlab.barrier", "x" * 201):
        with pytest.raises(fl.InvalidRequest):
            run._source.send(p.SendEvent(name=wrong))
    run.cancel()


def test_pages_are_read_by_cursor(client: fl.Client) -> None:
    run = client.submit(sums(client))
    run.wait(timeout=100)
    path = {"experiment": run.id}

    def every(endpoint: str, kind: type[Any], field: str, **query: Any) -> list[Any]:
        found, after = [], 0
        while True:
            page = session(client).call(endpoint, kind, path=path, query={"after": after, "limit": 3, **query})
            entries = getattr(page, field)
            assert len(entries) <= 3
            if not entries:
                assert page.cursor == after
                return found
            found += entries
            after = page.cursor

    whole = session(client).call("events", p.EventPage, path=path)
    assert tuple(every("events", p.EventPage, "events")) == whole.events
    for lane in p.Lane:
        records = session(client).call("records", p.RecordPage, path=path, query={"lane": lane.value})
        assert tuple(every("records", p.RecordPage, "records", lane=lane.value)) == records.records
        for one in run.info.deployments:
            own = tuple(entry for entry in records.records if entry.deployment == one.name)
            assert tuple(every("records", p.RecordPage, "records", lane=lane.value, deployment=one.name)) == own
    with pytest.raises(fl.NotFound):
        session(client).call("records", p.RecordPage, path=path, query={"lane": "bulk", "deployment": "nobody"})
    with pytest.raises(fl.InvalidRequest):
        session(client).call("records", p.RecordPage, path=path)
    for wrong in ({"lane": "slow"}, {"lane": "bulk", "limit": 0}, {"lane": "bulk", "after": -1}):
        with pytest.raises(fl.InvalidRequest):
            session(client).call("records", p.RecordPage, path=path, query=wrong)


def test_a_poll_that_nothing_answers_comes_back_empty(client: fl.Client) -> None:
    run = client.prepare(sums(client))
    run.events.wait("fieldlab.deployment", count=4, timeout=60)
    last = run.events.count("fieldlab.deployment")
    page = session(client).call("events", p.EventPage, path={"experiment": run.id}, query={"after": last}, wait=0.3)
    assert (page.events, page.cursor) == ((), last)
    run.cancel()


# --- names ------------------------------------------------------------------------------------------------------------


def test_what_a_taken_name_means_is_the_callers_choice(client: fl.Client) -> None:
    called = name()
    first = client.prepare(sums(client, called))
    with pytest.raises(fl.ExperimentExists, match='if_exists="new"'):
        client.prepare(sums(client, called))
    assert client.prepare(sums(client, called), if_exists="attach").id == first.id
    others = [client.prepare(sums(client, called), if_exists="new") for _ in range(2)]
    assert [one.name for one in others] == [f"{called}#2", f"{called}#3"]
    assert client.run(f"{called}#3").id == client.run(others[1].id).id == others[1].id
    for run in (first, *others):
        run.cancel()


def test_a_request_that_is_repeated_makes_one_run(client: fl.Client) -> None:
    from fieldlab.ship import pack, upload

    shipment = pack(sums(client))
    upload(session(client), shipment)
    headers = {"idempotency-key": name()}
    request = shipment.request(if_exists="new", start=False)
    first, second = (session(client).call("submit", p.ExperimentInfo, body=request, headers=headers) for _ in range(2))
    assert first.id == second.id
    other = shipment.request(if_exists="new", start=True)
    with pytest.raises(fl.InvalidRequest):
        session(client).call("submit", p.ExperimentInfo, body=other, headers=headers)
    client.run(first.id).cancel()


def test_what_an_experiment_names_must_be_there(client: fl.Client) -> None:
    with fl.DAG("d") as dag:
        add(1, 2)
    with pytest.raises(fl.NotFound, match="nowhere"):
        client.submit(fl.Experiment(name()).map(dag, fl.Node.dummy("nowhere", python=client.nodes()["a"].python)))
    spec = p.DeploymentSpec(name="a", node="a", environment=p.Tagged(kind="host"), graph="0" * 64)
    with pytest.raises(fl.NotFound, match="blobs"):
        session(client).call("submit", p.ExperimentInfo, body=p.SubmitExperiment(name=name(), deployments=(spec,)))
    with fl.DAG("d") as dag:
        add(fl.secret("not-stored"), 2)
    with pytest.raises(fl.NotFound, match="not-stored"):
        client.submit(fl.Experiment(name()).map(dag, client.nodes()["a"]))
    with pytest.raises(fl.NotFound):
        client.run("no-such-run")


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../x"},
        {"if_exists": "maybe"},
        {"deployments": ()},
        {"deployments": (p.DeploymentSpec(name="a/b", node="a", environment=p.Tagged(kind="host"), graph="0" * 64),)},
        {"deployments": (p.DeploymentSpec(name="a", node="a", environment=p.Tagged(kind="host"), graph="0" * 64),) * 2},
        {"deployments": (p.DeploymentSpec(name="a", node="a", environment=p.Tagged(kind="moon"), graph="0" * 64),)},
        {"deployments": (p.DeploymentSpec(name="a", node="a", environment=p.Tagged(kind="host"), graph="x"),)},
        {"settings": p.ExperimentSettings(reporting="loud")},
    ],
    ids=["name", "if_exists", "none", "deployment", "twice", "environment", "digest", "reporting"],
)
def test_a_request_that_makes_no_sense_is_refused_with_its_place(client: fl.Client, wrong: dict[str, Any]) -> None:
    good = p.DeploymentSpec(name="a", node="a", environment=p.Tagged(kind="host"), graph="0" * 64)
    request = p.SubmitExperiment(**{"name": name(), "deployments": (good,), **wrong})
    with pytest.raises(fl.InvalidRequest) as caught:
        session(client).call("submit", p.ExperimentInfo, body=request)
    assert str(caught.value.details["path"]).startswith(f"$.{next(iter(wrong))}")


def test_a_body_of_another_form_is_refused_with_its_place(client: fl.Client) -> None:
    with pytest.raises(fl.InvalidRequest) as caught:
        session(client).call("submit", p.ExperimentInfo, body={"name": 5, "deployments": []})
    assert caught.value.details["path"] == "$.name"


def test_experiments_are_listed_newest_first_and_by_state(client: fl.Client) -> None:
    runs = [client.prepare(sums(client)) for _ in range(3)]
    runs[1].cancel()
    runs[1].wait(timeout=60)
    names = [one.name for one in client.experiments()]
    assert names[:3] == [run.name for run in reversed(runs)]
    assert runs[1].name in [one.name for one in client.experiments(state="cancelled")]
    assert runs[0].name not in [one.name for one in client.experiments(state="cancelled")]
    first = session(client).call("experiments", p.ExperimentPage, query={"limit": 2})
    second = session(client).call("experiments", p.ExperimentPage, query={"limit": 2, "after": first.next})
    assert [one.name for one in (*first.experiments, *second.experiments)][:3] == names[:3]
    for wrong in ({"state": "asleep"}, {"after": "nothing"}):
        with pytest.raises(fl.InvalidRequest):
            session(client).call("experiments", p.ExperimentPage, query=wrong)
    for run in runs:
        run.cancel()


# --- start, and cancel ------------------------------------------------------------------------------------------------


def test_what_is_prepared_runs_when_it_is_started(client: fl.Client) -> None:
    run = client.prepare(sums(client))
    run.events.wait("fieldlab.deployment", count=4, timeout=60)
    assert run.state in (fl.ExperimentState.PREPARING, fl.ExperimentState.READY)
    assert run.start().start().wait(timeout=100) is fl.ExperimentState.SUCCEEDED
    assert run.start().state is fl.ExperimentState.SUCCEEDED


def test_a_run_that_was_cancelled_before_it_started_cannot_be_started(client: fl.Client) -> None:
    run = client.prepare(sums(client))
    assert run.cancel("not needed").wait(timeout=60) is fl.ExperimentState.CANCELLED
    with pytest.raises(fl.IllegalState):
        run.start()
    assert {one.state for one in run.deployments.values()} == {fl.DeploymentState.CANCELLED}


def test_a_cancel_ends_what_runs_and_changes_nothing_that_has_ended(client: fl.Client) -> None:
    run = client.submit(sums(client, gated=True))
    for one in ("a", "b"):
        run.events.wait(
            "fieldlab.deployment", where=lambda e, one=one: e.data == {**e.data, "deployment": one, "state": "running"}
        )
    run.cancel(nodes="a")
    run.events.wait("fieldlab.deployment", where=lambda e: e.data["state"] == "cancelled", timeout=60)
    run.events.send("go")
    run.events.wait("fieldlab.deployment", where=lambda e: e.data["state"] == "succeeded", timeout=60)
    assert run.wait(timeout=60) is fl.ExperimentState.FAILED
    assert run.results["a"].reason is fl.Reason.CANCELLED
    assert run.results["b"]["total"].value == 6
    assert run.cancel("too late").state is fl.ExperimentState.FAILED
    with pytest.raises(fl.NotFound):
        run.cancel(deployments=["zzz"])


def test_a_whole_run_is_cancelled(client: fl.Client) -> None:
    run = client.submit(sums(client, gated=True))
    run.events.wait("fieldlab.deployment", where=lambda e: e.data["state"] == "running", timeout=60)
    assert run.cancel("wrong site").wait(timeout=60) is fl.ExperimentState.CANCELLED
    assert {one.reason for one in run.deployments.values()} == {fl.Reason.CANCELLED}


# --- again, and away --------------------------------------------------------------------------------------------------


def test_a_run_is_repeated_as_it_was_under_the_next_name(client: fl.Client) -> None:
    first = client.submit(sums(client))
    first.wait(timeout=100, raise_on_failure=True)
    again = first.rerun()
    assert again.name == f"{first.name}#2"
    assert again.rerun(start=False).name == f"{first.name}#3"
    assert again.wait(timeout=100) is fl.ExperimentState.SUCCEEDED
    assert again.results["b"]["total"].value == 6
    client.run(f"{first.name}#3").cancel()


def test_a_run_that_has_ended_is_deleted_and_its_name_is_free(client: fl.Client) -> None:
    called = name()
    run = client.prepare(sums(client, called))
    with pytest.raises(fl.IllegalState):
        run.delete()
    run.delete(force=True)
    for ask in (lambda: client.run(called), lambda: run.info, lambda: run.events.count("x"), lambda: run.delete()):
        with pytest.raises(fl.NotFound):
            ask()
    assert called not in [one.name for one in client.experiments()]
    client.prepare(sums(client, called)).cancel()


def test_experiments_are_found_by_name_and_time(client: fl.Client) -> None:
    called = name()
    runs = [client.prepare(sums(client, f"{called}-{kind}")) for kind in ("dns", "DNS-2", "tcp")]
    assert {one.name for one in client.experiments(name=f"{called}-dns*")} == {runs[0].name, runs[1].name}
    assert [one.name for one in client.experiments(name=f"{called}-t?p")] == [runs[2].name]
    assert not client.experiments(name="[a-z]*")
    assert {run.name for run in runs} <= {one.name for one in client.experiments(since="1h")}
    page = session(client).call("experiments", p.ExperimentPage, query={"since": runs[0].info.created + 1e6})
    assert page.experiments == ()
    for run in runs:
        run.cancel()


# --- large values -----------------------------------------------------------------------------------------------------


@fl.task
def much() -> bytes:
    return b"0123456789" * 100_000


STAND_INS["much"] = lambda: b"0123456789" * 100_000


def test_a_large_value_comes_as_a_blob(client: fl.Client, tmp_path: Path) -> None:
    with fl.DAG("d") as dag:
        much()
    run = client.submit(fl.Experiment(name()).map(dag, client.nodes()["a"]))
    run.wait(timeout=100, raise_on_failure=True)
    assert run.results["a"]["much"].value == b"0123456789" * 100_000
    assert run.artifacts.download(tmp_path) == []  # a spilled value is no artifact
    assert [row.state.value for row in run.timeline().of("a", "much")] == ["running", "succeeded"]
