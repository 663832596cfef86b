"""A director's services behind real HTTP, in a thread; what reaches nodes is played by the tests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import socket
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import dockerlab
import httpx2
import pytest
import slurmlab
import sqlalchemy as sa
import uvicorn
from fieldlab_common.accounts import Role
from fieldlab_common.course import NEVER
from fieldlab_common.environment import Host
from fieldlab_common.keeping import Checked
from fieldlab_common.lifecycle import DeploymentState, ExperimentState
from fieldlab_common.node import Availability, Node
from fieldlab_common.protocol import CheckLine, ClaimRequest, DeploymentSpec, Record, SubmitExperiment, Tagged
from fieldlab_common.wire import dumps, encode, frame
from fieldlab_director.app import open_blobs, open_store
from fieldlab_director.connectors.base import Surveyed
from fieldlab_director.http import make_http
from fieldlab_director.services.accounts import add_user, create_token
from fieldlab_director.services.desk import Desk
from fieldlab_director.services.identity import executor_token
from fieldlab_director.services.outcome import move
from fieldlab_director.serving import server_config
from fieldlab_director.settings import Limits, Settings
from fieldlab_director.store import queries, schema
from fieldlab_director.store.base import Store, Tx
from fieldlab_director.store.databases import Database
from fieldlab_director.store.rows import DeploymentRow, ExperimentRow
from fieldlab_director.store.states import set_experiment_state

T = TypeVar("T")
D = DeploymentState


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The executor as one file, as a director packs it."""
    path = tmp_path_factory.mktemp("executable") / "fieldlab.pyz"
    subprocess.run([sys.executable, "-P", "-m", "fieldlab_executor", "pack", str(path)], check=True, timeout=60)
    return path


@pytest.fixture(scope="session")
def engine() -> Iterator[dockerlab.DockerLab]:
    """A real Docker engine."""
    if why := dockerlab.missing():
        pytest.skip(why)
    with contextlib.closing(dockerlab.DockerLab()) as lab:
        yield lab


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurmlab.Slurmlab]:
    """A real Slurm cluster, on this machine."""
    if why := slurmlab.missing():
        pytest.skip(why)
    names = ("local-1", "local-2", "local-3")
    with contextlib.closing(slurmlab.Slurmlab(tmp_path_factory.mktemp("slurmlab"), names)) as lab:
        yield lab


@dataclass
class Fleet:
    """Infrastructure that has the nodes its options name."""

    surveyed: list[Mapping[str, Any]] = field(default_factory=list)
    trusted: list[bool] = field(default_factory=list)  # of each time that it was asked
    reason: str = ""  # why its nodes are offline

    @property
    def availability(self) -> Availability:
        return Availability.OFFLINE if self.reason else Availability.AVAILABLE

    async def survey(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Surveyed:
        self.surveyed.append(options)
        self.trusted.append(trusted)
        return self.seen(name, options)

    async def check(
        self, infrastructure_id: str, name: str, kind: str, options: Mapping[str, Any], *, trusted: bool = False
    ) -> Surveyed:
        self.trusted.append(trusted)
        return self.seen(name, options)

    def seen(self, name: str, options: Mapping[str, Any]) -> Surveyed:
        nodes = tuple(
            Node(name=node, infrastructure=name, os="linux", availability=self.availability, reason=self.reason)
            for node in options["nodes"]
        )
        lines = tuple(
            CheckLine(node=node.name, what="reachable", ok=not self.reason, said=self.reason) for node in nodes
        )
        return Surveyed(nodes=nodes, checked=Checked(lines=lines))


@dataclass
class Executor:
    """What an executor says over HTTP."""

    lab: Lab
    token: str
    journal: str = "j1"
    epoch: int = 1

    def __post_init__(self) -> None:
        self.http = self.lab.client(self.token)

    def on(self, lab: Lab) -> Executor:
        """The same executor, before another director."""
        return replace(self, lab=lab)

    def claim(self, **changes: Any) -> httpx2.Response:
        request = ClaimRequest(**{"journal_id": self.journal, "epoch": self.epoch, **changes})
        return self.http.post("/v1/executor/claim", content=dumps(request))

    def send(self, body: bytes, lane: str = "control") -> httpx2.Response:
        return self.http.post("/v1/executor/records", params={"lane": lane, "journal": self.journal}, content=body)

    def report(self, *records: tuple[int, str, Mapping[str, Any]], lane: str = "control") -> httpx2.Response:
        return self.send(
            b"".join(frame(n, dumps(Record(kind=kind, at=n, body=body))) for n, kind, body in records), lane
        )

    def poll(self, **query: Any) -> httpx2.Response:
        return self.http.get("/v1/executor/poll", params={"journal": self.journal, **query})


class Lab:
    """The services on a loopback port, and a way into their store."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.fleet = Fleet()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._clients: list[httpx2.Client] = []
        self.loop: asyncio.AbstractEventLoop
        self.store: Store
        self._thread.start()
        assert self._ready.wait(20)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.vault, self.store = await open_store(self.settings)
        self.settings.executable.write_bytes(b"an executor, packed")
        blobs = await open_blobs(self.settings)
        self.desk = Desk(self.settings, self.store, blobs, self.vault, self.fleet, "0")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self.server = uvicorn.Server(server_config(make_http(self.desk), self.settings))
            self._ready.set()
            await self.server.serve(sockets=[listener])
        await self.store.close()

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.loop.call_soon_threadsafe(self.store.notifier.close)
        self.server.should_exit = True
        self._thread.join(20)

    def client(self, token: str = "") -> httpx2.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx2.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False, verify=False)
        self._clients.append(client)
        return client

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop of the services."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What comes of a coroutine, on the loop of the services."""
        return self.begin(coroutine).result(60)

    def until_watched(self, topic: str) -> None:
        """Wait until somebody waits for ``topic``."""

        async def watched() -> None:
            async with asyncio.timeout(30):
                while topic not in self.store.notifier._watches:  # noqa: ASYNC110 - nothing tells of who waits
                    await asyncio.sleep(0.01)

        self.run(watched())

    def write(self, fn: Callable[[Tx], T]) -> T:
        return self.run(self.store.write(fn))

    def member(self, name: str) -> User:
        """A user with two nodes, who can submit."""
        return _user(self, name)

    def user(self, name: str, role: str = "member") -> httpx2.Client:
        def make(tx: Tx) -> str:
            add_user(tx, name, role=role)
            return create_token(tx, name).token

        return self.client(self.write(make))

    def row(self, experiment: str, name: str = "a") -> DeploymentRow:
        rows = self.write(lambda tx: tx.all(queries.DEPLOYMENTS, DeploymentRow, experiment_id=experiment))
        return next(row for row in rows if row.name == name)

    def move(self, row: DeploymentRow, *states: DeploymentState) -> DeploymentRow:
        def run(tx: Tx) -> DeploymentRow:
            moved = row
            for state in states:
                moved = move(tx, moved, state)
            return moved

        return self.write(run)

    def finish(self, experiment: str) -> None:
        """What is left of an experiment that was cancelled, once its nodes are cleaned up."""
        ended = {"state": DeploymentState.CANCELLED, "look_at": NEVER}
        of = schema.deployments.c.experiment_id == experiment
        self.write(lambda tx: tx.execute(sa.update(schema.deployments).where(of).values(ended)))

    def launch(self, experiment: str, name: str = "a", *, epoch: int = 1) -> Executor:
        """What the reconcile loop does until an executor starts."""
        row = self.row(experiment, name)
        if row.state is D.PENDING:
            self.move(row, D.PREPARING, D.READY, D.LAUNCHING)
            self.write(lambda tx: _begin(tx, experiment))
        values = {"epoch": epoch, "journal_id": None}
        self.write(lambda tx: tx.execute(sa.update(schema.deployments).where(_is(row)).values(values)))
        return Executor(self, executor_token(self.vault.executor_key, row.id, epoch), epoch=epoch)


def _begin(tx: Tx, experiment: str) -> None:
    row = tx.one(queries.EXPERIMENT, ExperimentRow, id=experiment)
    if row is not None and row.state is ExperimentState.PREPARING:
        set_experiment_state(tx, set_experiment_state(tx, row, ExperimentState.READY), ExperimentState.RUNNING)


def _is(row: DeploymentRow) -> sa.ColumnElement[bool]:
    return schema.deployments.c.id == row.id


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The lab of a module is on SQLite and a folder, or is each of the kinds that the module names in ``LABS``."""
    if "lab" in metafunc.fixturenames:
        kinds = getattr(metafunc.module, "LABS", ("sqlite",))
        metafunc.parametrize("lab", kinds, indirect=True, scope="module")


@pytest.fixture(scope="module")
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    places: dict[str, Any] = {}
    if request.param == "postgres":
        places["database_url"] = request.getfixturevalue("postgres").make()
    elif request.param == "s3":
        places["blobs_url"], places["blobs_endpoint"] = request.getfixturevalue("s3").make()
    limits = Limits(page=100, json_body=1024 * 1024)
    lab = Lab(Settings(data=tmp_path_factory.mktemp("lab") / "data", limits=limits, **places))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def make_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Lab]]:
    """A lab with limits, and settings, of its own."""
    made: list[Lab] = []

    def make(limits: Limits, **settings: Any) -> Lab:
        data = tmp_path_factory.mktemp("lab") / "data"
        made.append(Lab(Settings(**{"data": data, "limits": limits, **settings})))
        return made[-1]

    yield make
    for lab in made:
        lab.close()


@dataclass
class User:
    """A user who has two nodes, and can submit."""

    lab: Lab
    http: httpx2.Client
    name: str

    def become(self, role: Role) -> None:
        users = schema.users
        self.lab.write(lambda tx: tx.execute(users.update().where(users.c.name == self.name).values(role=role)))

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        answer = self.http.put(f"/v1/blobs/{digest}", params={"offset": 0, "size": len(data)}, content=data)
        assert answer.status_code == 200, answer.text
        return digest

    def request(
        self,
        name: str = "exp",
        *,
        deployments: Sequence[str] = ("a",),
        secrets: tuple[str, ...] = (),
        blobs: Sequence[bytes] = (),
        **changes: Any,
    ) -> SubmitExperiment:
        graph = self.put(b"graph")
        environment = Tagged(kind="host", body=encode(Host()))
        fields: dict[str, Any] = {"environment": environment, "graph": graph, "steps": 1, "secrets": secrets}
        fields["blobs"] = tuple(map(self.put, blobs))
        specs = [DeploymentSpec(name=n, node="n1", **fields) for n in deployments]
        return SubmitExperiment(**{"name": name, "deployments": tuple(specs), **changes})

    def submit(self, name: str = "exp", *, key: str = "", **changes: Any) -> httpx2.Response:
        headers = {"Idempotency-Key": key} if key else {}
        return self.http.post("/v1/experiments", content=dumps(self.request(name, **changes)), headers=headers)

    def experiment(self, name: str = "exp", **changes: Any) -> str:
        answer = self.submit(name, **changes)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])


def _user(lab: Lab, name: str) -> User:
    """A user of a name that no other test has: tests share the lab, and users see only their own."""
    unique = f"{name}-{next(_count)}"
    http = lab.user(unique, "admin")
    body = {"name": "lab", "spec": {"kind": "local", "body": {"nodes": ["n1", "n2"]}}, "access": []}
    assert http.post("/v1/infrastructures", json=body).status_code == 201
    return User(lab, http, unique)


_count = itertools.count()


@pytest.fixture(scope="module")
def make_user(lab: Lab) -> Callable[[str], User]:
    return lambda name: _user(lab, name)


@pytest.fixture
def ada(lab: Lab) -> User:
    return _user(lab, "ada")


@pytest.fixture
def bob(lab: Lab) -> User:
    return _user(lab, "bob")


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A database of each kind, with the tables of this release."""
    if request.param == "postgres":
        yield Database(path=tmp_path / "none", url=request.getfixturevalue("postgres").make())
        return
    memory = request.param == "memory"
    where = f"file:/{uuid.uuid4()}?vfs=memdb" if memory else str(tmp_path / "d.db")
    kept = sqlite3.connect(where, uri=memory)  # what is in memory lives as long as somebody has it open
    made = Database(path=where)
    made.upgrade()
    yield made
    kept.close()
