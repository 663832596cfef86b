"""The client against a director made of a dictionary: what it asks, in which order, and what it does with answers."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import fieldlab as fl
import pytest
from fieldlab.client import Client
from fieldlab.transport import Answer, Request, Stream
from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.errors import (
    BlobMismatch,
    DefinitionError,
    DirectorUnreachable,
    ExperimentExists,
    PlanError,
    ProtocolMismatch,
)
from fieldlab_common.lifecycle import DeploymentState, ExperimentState

JSON = {"content-type": "application/json"}


class Director:
    """Answers as the table says; ``cut`` makes the next answers to an endpoint get lost on the way back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Request]] = []
        self.blobs: dict[str, bytearray] = {}
        self.sizes: dict[str, int] = {}
        self.submitted: dict[str, p.SubmitExperiment] = {}
        self.cut: dict[str, int] = {}
        self.protocols: tuple[int, ...] = (1,)
        self.stream_cuts: list[int] = []

    def send(self, request: Request) -> Answer:
        row, path = self._row(request)
        self.asked.append((row.name, request))
        query = dict(parse_qsl(urlsplit(request.url).query))
        answer = self._answer(row, path, query, request)
        if self.cut.get(row.name, 0) > 0:
            self.cut[row.name] -= 1
            raise DirectorUnreachable("cut", details={"sent": True})
        return answer

    def _row(self, request: Request) -> tuple[p.Endpoint, dict[str, str]]:
        parts = urlsplit(request.url).path.split("/")
        for row in p.ENDPOINTS.values():
            wanted = row.path.split("/")
            if row.method == request.method and len(wanted) == len(parts):
                pairs = list(zip(wanted, parts, strict=True))
                if all(w == have or w.startswith("{") for w, have in pairs):
                    return row, {w[1:-1]: have for w, have in pairs if w.startswith("{")}
        raise AssertionError(request.url)

    def _answer(self, row: p.Endpoint, path: dict[str, str], query: dict[str, str], request: Request) -> Answer:
        try:
            value = getattr(self, "on_" + row.name)(path, query, request)
        except fl.FieldlabError as error:
            body = json.dumps({"title": "t", "status": error.status, "code": error.code, "detail": error.message})
            return Answer(status=error.status, headers={"content-type": p.PROBLEM}, body=body.encode())
        return Answer(status=row.status, headers=JSON, body=wire.dumps(value))

    def on_health(self, path: Any, query: Any, request: Request) -> p.Health:
        return p.Health(version="1", protocols=self.protocols)

    def on_nodes(self, path: Any, query: Any, request: Request) -> p.NodeList:
        return p.NodeList(nodes=(fl.Node.dummy("a"), fl.Node.dummy("b")))

    def on_missing_blobs(self, path: Any, query: Any, request: Request) -> p.BlobList:
        asked = wire.loads(p.BlobList, request.body or b"")
        return p.BlobList(digests=tuple(d for d in asked.digests if not self._complete(d)))

    def _complete(self, digest: str) -> bool:
        return digest in self.blobs and len(self.blobs[digest]) == self.sizes[digest]

    def on_blob_status(self, path: Any, query: Any, request: Request) -> p.BlobStatus:
        digest = path["digest"]
        return p.BlobStatus(digest=digest, offset=len(self.blobs.get(digest, b"")), complete=self._complete(digest))

    def on_put_blob(self, path: Any, query: Any, request: Request) -> p.BlobStatus:
        held = self.blobs.setdefault(path["digest"], bytearray())
        self.sizes[path["digest"]] = int(query["size"])
        if int(query["offset"]) != len(held):
            raise BlobMismatch("wrong offset")
        held += request.body or b""
        return self.on_blob_status(path, query, request)

    def on_submit(self, path: Any, query: Any, request: Request) -> p.ExperimentInfo:
        body = wire.loads(p.SubmitExperiment, request.body or b"")
        key = request.headers["idempotency-key"]
        if key not in self.submitted and any(s.name == body.name for s in self.submitted.values()):
            raise ExperimentExists(f"There is an experiment {body.name!r}.")
        self.submitted[key] = body
        deployments = tuple(
            p.DeploymentInfo(name=d.name, node=d.node, state=DeploymentState.PENDING, graph=d.graph)
            for d in body.deployments
        )
        return p.ExperimentInfo(id="e1", name=body.name, state=ExperimentState.PREPARING, deployments=deployments)

    def on_experiments(self, path: Any, query: dict[str, str], request: Request) -> p.ExperimentPage:
        start = int(query.get("after", 0))
        infos = [p.ExperimentInfo(id=str(n), name=f"e{n}", state=ExperimentState.SUCCEEDED) for n in range(5)]
        page = tuple(infos[start : start + 2])
        return p.ExperimentPage(experiments=page, next=str(start + 2) if start + 2 < 5 else None)

    def on_artifacts(self, path: Any, query: Any, request: Request) -> p.ArtifactList:
        data = bytes(self.blobs["file"])
        digest = hashlib.sha256(data).hexdigest()
        one = p.ArtifactInfo(deployment="a", step="s", name="x", size=len(data), sha256=digest, stored=True)
        return p.ArtifactList(artifacts=(one,))

    def on_experiment(self, path: Any, query: Any, request: Request) -> p.ExperimentInfo:
        return p.ExperimentInfo(id=path["experiment"], name="e", state=ExperimentState.SUCCEEDED)

    @contextmanager
    def stream(self, request: Request) -> Iterator[Stream]:
        self.asked.append(("stream", request))
        begin = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        data = bytes(self.blobs["file"])[begin:]

        def chunks() -> Iterator[bytes]:
            if self.stream_cuts:
                yield data[: self.stream_cuts.pop(0)]
                raise DirectorUnreachable("cut", details={"sent": True})
            yield data

        yield Stream(Answer(status=206 if begin else 200), chunks())

    def close(self) -> None:
        pass


@pytest.fixture
def director() -> Director:
    return Director()


@pytest.fixture
def client(director: Director) -> Client:
    made = Client("http://d.test", "t", transport=director)
    made._session._sleep = lambda seconds: None
    return made


@fl.task
def work(data: object = None) -> int:
    return 1


def experiment(client: Client, name: str = "exp", data: object = None) -> fl.Experiment:
    with fl.DAG("d") as dag:
        work(data)
    return fl.Experiment(name).map(dag, client.nodes())


def names(director: Director) -> list[str]:
    return [name for name, _ in director.asked]


def test_a_submit_brings_blobs_first_and_then_asks_once(client: Client, director: Director) -> None:
    run = client.submit(experiment(client))
    assert names(director)[0:2] == ["nodes", "missing_blobs"]
    assert names(director)[-1] == "submit"
    body = next(iter(director.submitted.values()))
    assert body.start
    for spec in body.deployments:
        assert set(spec.blobs) <= set(director.blobs)
    for digest, data in director.blobs.items():
        assert hashlib.sha256(data).hexdigest() == digest
    assert run.name == "exp"


def test_what_the_director_has_is_not_sent_again(client: Client, director: Director) -> None:
    client.submit(experiment(client, "one"))
    before = names(director).count("put_blob")
    client.submit(experiment(client, "two"))
    assert names(director).count("put_blob") == before


def test_prepare_does_not_start(client: Client, director: Director) -> None:
    client.prepare(experiment(client))
    assert not next(iter(director.submitted.values())).start


def test_a_submit_whose_answer_was_lost_makes_one_run(client: Client, director: Director) -> None:
    director.cut["submit"] = 2
    client.submit(experiment(client))
    keys = {r.headers["idempotency-key"] for name, r in director.asked if name == "submit"}
    assert names(director).count("submit") == 3
    assert len(keys) == 1


def test_two_submits_are_two(client: Client, director: Director) -> None:
    client.submit(experiment(client, "one"))
    client.submit(experiment(client, "two"))
    assert len(director.submitted) == 2


def test_an_upload_whose_answer_was_lost_continues_from_what_is_there(client: Client, director: Director) -> None:
    big = bytes(range(256)) * 50_000
    director.cut["put_blob"] = 1
    client.submit(experiment(client, data=big))
    for digest, data in director.blobs.items():
        assert hashlib.sha256(data).hexdigest() == digest


def test_a_name_that_is_taken_says_what_to_do(client: Client) -> None:
    client.submit(experiment(client))
    with pytest.raises(ExperimentExists, match="attach"):
        client.submit(experiment(client))


def test_what_cannot_run_is_told_before_anything_is_sent(client: Client, director: Director) -> None:
    made = experiment(client, data=threading.Lock())
    director.asked.clear()
    with pytest.raises(PlanError):
        client.submit(made)
    assert director.asked == []


def test_an_unknown_way_for_existing_names_is_refused(client: Client) -> None:
    with pytest.raises(DefinitionError, match="attach"):
        client.submit(experiment(client), if_exists="overwrite")


def test_a_time_without_a_zone_is_refused(client: Client) -> None:
    with pytest.raises(fl.DefinitionError, match="time zone"):
        client.experiments(since=dt.datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point


def test_a_state_that_no_experiment_has_is_refused_with_those_that_there_are(client: Client) -> None:
    with pytest.raises(DefinitionError, match="state='done': it is one of preparing, ready, running"):
        client.experiments(state="done")


def test_experiments_are_read_page_by_page(client: Client) -> None:
    assert [one.name for one in client.experiments()] == ["e0", "e1", "e2", "e3", "e4"]
    assert len(client.experiments(limit=3)) == 3
    assert "e4" in repr(client.experiments())


def test_health_compares_protocols(client: Client, director: Director) -> None:
    assert client.health().version == "1"
    director.protocols = (2,)
    with pytest.raises(ProtocolMismatch, match="Upgrade fieldlab here"):
        client.health()


def test_a_download_goes_on_from_where_it_was_cut(client: Client, director: Director, tmp_path: Path) -> None:
    director.blobs["file"] = bytearray(b"0123456789")
    director.stream_cuts = [3, 2]
    client.health()
    written = client.run("e").artifacts.download(tmp_path)
    assert written[0].read_bytes() == b"0123456789"
    ranges = [r.headers.get("range") for name, r in director.asked if name == "stream"]
    assert ranges == [None, "bytes=3-", "bytes=5-"]


def test_infrastructure_is_a_kind_and_its_options() -> None:
    tagged = fl.Local(nodes=3).tagged()
    assert (tagged.kind, tagged.body["nodes"]) == ("local", 3)
    with pytest.raises(DefinitionError):
        fl.Local(nodes=0)


def test_the_client_never_shows_its_token(client: Client) -> None:
    assert repr(client) == "<Client of http://d.test>"


def test_a_client_closes_with_its_block(director: Director) -> None:
    with Client("http://d.test", "t", transport=director) as made:
        assert len(made.nodes()) == 2


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_was_chosen_and_rejected_and_why() -> None:
    @fl.task
    def probe() -> int:
        return 1

    @probe.implementation(when=fl.node.os == "windows")
    def probe_windows() -> int:
        return 2

    with fl.DAG("d") as dag:
        probe()
    made = fl.plan(fl.Experiment("e").map(dag, [fl.Node.dummy("a", os="linux"), fl.Node.dummy("b", os="macos")]))
    assert made
    step = made.to_dict()["deployments"][0]["steps"][0]
    assert step["implementation"] == "base"
    assert step["rejected"] == [{"implementation": "probe_windows", "because": "`os` is 'linux', not 'windows'"}]
    assert "no task asks for packages" in repr(made)
    assert json.loads(made.to_json())["deployments"][1]["environment"]["kind"] == "host"


def test_a_plan_has_one_line_for_all_that_chose_alike_whatever_else_they_decide() -> None:
    @fl.task
    def probe() -> int:
        return 1

    @probe.implementation(when=fl.node.os == "macos")
    def probe_macos() -> int:
        return 2

    with fl.DAG("d") as dag:
        probe()
        work()
    nodes = [fl.Node.dummy(name, os=os) for name, os in (("a", "linux"), ("b", "macos"), ("c", "linux"))]
    made = fl.plan(fl.Experiment("e").map(dag, nodes))
    lines = [line.split() for line in repr(made).splitlines()]
    assert [line[2] for line in lines if line[:1] == ["probe"]] == ["base", "probe_macos"]
    assert [line[3:6] for line in lines if line[:1] == ["work"]] == [["a,", "b,", "c"]]
    assert [d["steps"][0]["implementation"] for d in made.to_dict()["deployments"]] == ["base", "probe_macos", "base"]


def test_a_plan_shows_problems_first_and_does_not_raise() -> None:
    with fl.DAG("d") as dag:
        work(fl.node["site"])
    made = fl.plan(fl.Experiment("e").map(dag, fl.Node.dummy("a")))
    assert not made
    assert repr(made).startswith("1 problem:\n  ! a, step work: the node has no `site`")
    assert made.problems[0].code == "unknown_name"
    assert "Problems" in made._repr_html_()


def test_a_plan_reports_a_circle() -> None:
    with fl.DAG("d") as dag:
        first, second = work().named("first"), work().named("second")
        first.after(second)
        second.after(first)
    made = fl.plan(dag)
    assert made.problems[0].code == "cycle"
    assert "first" in made.problems[0].message


def test_a_dag_is_planned_for_this_machine() -> None:
    with fl.DAG("d") as dag:
        work()
    assert fl.plan(dag).deployments[0].node.name == "localhost"
