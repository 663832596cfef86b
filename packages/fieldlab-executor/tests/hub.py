"""A director's half of the pipe, in memory: what an executor asks is answered, what it reports is kept.

``Hub`` is the other end; ``Executor`` a real executor process that speaks to it. ``Bench`` makes what a client would
have made.
"""

import base64
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fieldlab_common import payload, wire
from fieldlab_common import protocol as p
from fieldlab_common.deployment import Graph, StepSpec
from fieldlab_common.environment import Environment, Host, Resources
from fieldlab_common.errors import ClaimRefused
from fieldlab_common.events import Event, Member
from fieldlab_common.node import Node
from fieldlab_common.protocol import Lane
from fieldlab_executor import frames

DEPLOYMENT = "pi-1"
SECONDS = 60.0
CONTROL = ("claim", "poll", "report control")


class Reference:
    """Something that leaves as a reference when arguments are sealed."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __fieldlab_reference__(self) -> tuple[Any, ...]:
        return self.parts


CTX = Reference("context")
ITEM = Reference("item")


def value_of(name: str, *path: Any) -> Reference:
    return Reference("step", name, "value", path)


class Blobs(dict[str, bytes]):
    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self[digest] = data
        return digest


class Bench:
    """Collects blobs and steps, and makes the graph of them."""

    def __init__(self, **graph: Any) -> None:
        self.blobs = Blobs()
        self._steps: list[StepSpec] = []
        self._graph = {"stop_on_failure": False, **graph}

    def code(self, function: Callable[..., Any]) -> str:
        return self.blobs.put(payload.seal(function, what="a function"))

    def step(self, name: str, function: Callable[..., Any], *args: Any, **spec: Any) -> StepSpec:
        sealed = self.blobs.put(payload.seal((args, {}), what="arguments"))
        made = StepSpec(name=name, task=name, code=self.code(function), args=sealed, **spec)
        self._steps.append(made)
        return made

    def graph(self) -> Graph:
        return Graph(name="graph", steps=tuple(self._steps), **self._graph)


class Hub:
    """Answers one executor over a socket."""

    def __init__(
        self,
        bench: Bench,
        *,
        members: tuple[Member, ...] | None = None,
        environment: Environment | None = None,
        python: str = "",
        resources: Resources | None = None,
        start_at: float | None = 0.0,
        ahead: float = 0.0,  # seconds by which the director's clock is ahead of this one
        **settings: Any,
    ) -> None:
        self.ahead = ahead
        self.blobs = bench.blobs
        graph = self.blobs.put(wire.dumps(bench.graph()))
        environment = environment or Host()
        spec = p.DeploymentSpec(
            name=DEPLOYMENT,
            node="here",
            environment=p.Tagged(kind=environment.kind, body=wire.encode(environment)),
            python=python,
            resources=resources or Resources(),
            graph=graph,
            blobs=tuple(b for b in self.blobs if b != graph),
        )
        self._claim = p.Claim(
            experiment_id="e-1",
            experiment="trial",
            deployment=spec,
            node=Node.dummy("here", site="lab"),
            members=members or (Member(deployment=DEPLOYMENT, node="here"),),
            settings=p.ExperimentSettings(**settings),
            server_time=time.time() + self.ahead,
            start_at=start_at,
        )
        self.records: dict[Lane, list[p.Record]] = {lane: [] for lane in Lane}
        self.events: list[Event] = []
        self.stored: dict[str, bytes] = {}
        self.requests: list[str] = []  # in the order in which they came: "report control", "poll", …
        self.replies: list[str] = []  # what was answered, likewise
        self.recalled: list[int] = []  # requests that were taken back
        self.control = 0  # bytes of all that is control, both ways
        self._asked: dict[int, str] = {}
        self._numbers: set[int] = set()  # of requests of control
        self.refuses = False
        self._cancel: p.CancelDeployment | None = None
        self._held: list[tuple[int, int]] = []
        self._changed = threading.Condition()
        self.ours, self.theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def start(self) -> None:
        self._thread.start()

    # --- what a test does and sees

    def cancel(self, reason: str = "a test") -> None:
        with self._changed:
            self._cancel = p.CancelDeployment(reason=reason)
            self._answer_polls()

    def send(self, name: str, data: Any = None, sender: str | None = None) -> None:
        with self._changed:
            self._add_event(Event(name=name, data=data, sender=sender, key=f"hub:{len(self.events)}"))

    def wait(self, ready: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: bool(ready()), seconds):
                raise AssertionError(f"{what} did not come; there is {self.records}")
            return ready()

    def bodies(self, kind: str, lane: Lane = Lane.CONTROL) -> list[Any]:
        cls = p.RECORDS[kind]
        return [wire.decode(cls, dict(r.body)) for r in self.records[lane] if r.kind == kind]

    def event(self, name: str) -> Any:
        """The data of the first event of that name, waited for."""
        return self.wait(lambda: [e for e in self.events if e.name == name], f"event {name!r}")[0].data

    def settled(self, step: str) -> p.StepRecord:
        return next(r for r in self.bodies("step") if r.step == step and r.settled)

    def value(self, step: str) -> Any:
        reference = self.settled(step).value
        assert reference is not None
        data = self.stored[reference.sha256] if reference.sha256 else base64.b64decode(reference.data)
        return payload.decode_value(reference.format, reference.json, data)

    def logs(self, step: str, stream: str = "stdout") -> str:
        return "".join(r.text for r in self.bodies("log", Lane.BULK) if r.step == step and r.stream == stream)

    @property
    def ended(self) -> p.Ended:
        return self.bodies("ended")[0]

    # --- the thread

    def _serve(self) -> None:
        unpacker = frames.Unpacker()
        try:
            while data := self.ours.recv(1 << 16):
                for header, body in unpacker.feed(data):
                    with self._changed:
                        self._take(header, body)
                        self._changed.notify_all()
        except OSError:  # the executor was killed
            pass
        finally:
            self.ours.close()

    def _take(self, header: Mapping[str, Any], body: bytes) -> None:
        if "recall" in header:
            self.recalled.append(header["recall"])
            self._held = [one for one in self._held if one[0] != header["recall"]]
            return
        query, number = header["query"], header["id"]
        asked = " ".join(filter(None, (header["endpoint"], query.get("lane"))))
        self.requests.append(asked)
        self._asked[number] = asked
        if asked in CONTROL:
            self.control += len(frames.pack(header, body))
            self._numbers.add(number)
        if header["endpoint"] == "poll" and float(query["wait"]) and not self._news(int(query["after"])):
            self._held.append((number, int(query["after"])))
            return
        answer = getattr(self, "_answer_" + header["endpoint"])(header["path"], query, body)
        if isinstance(answer, ClaimRefused):
            problem = p.Problem(title="refused", status=409, code=answer.code, detail=answer.message)
            self._reply(number, 409, wire.dumps(problem))
        else:
            self._reply(number, 200, answer if isinstance(answer, bytes) else wire.dumps(answer))

    def _reply(self, number: int, status: int, body: bytes) -> None:
        self.replies.append(self._asked.pop(number))
        self.control += len(body) if number in self._numbers else 0
        try:
            self.ours.sendall(frames.pack({"id": number, "status": status}, body))
        except OSError:  # the executor is gone
            return

    def _answer_claim(self, path: Any, query: Any, body: bytes) -> Any:
        return ClaimRefused("Another has it.") if self.refuses else self._claim

    def _answer_get_blob(self, path: Any, query: Any, body: bytes) -> bytes:
        offset = int(query.get("offset", 0))
        return self.blobs[path["digest"]][offset : offset + int(query.get("limit", 1 << 30))]

    def _answer_report(self, path: Any, query: Any, body: bytes) -> p.Ack:
        lane, last = Lane(query["lane"]), 0
        for number, data, _ in wire.unframe(body):
            last = number
            if number <= len(self.records[lane]):
                continue
            record = wire.loads(p.Record, data)
            self.records[lane].append(record)
            if record.kind == "event":
                sent = wire.decode(p.EventRecord, dict(record.body))
                key = f"{query['journal']}:{number}"
                self._add_event(Event(name=sent.name, data=sent.data, sender=DEPLOYMENT, step=sent.step, key=key))
        return p.Ack(acked=last)

    def _answer_poll(self, path: Any, query: Any, body: bytes) -> p.Poll:
        return self._news(int(query["after"])) or p.Poll()

    def _answer_blob_status(self, path: Any, query: Any, body: bytes) -> p.BlobStatus:
        return p.BlobStatus(digest=path["digest"], offset=len(self.stored.get(path["digest"], b"")))

    def _answer_put_blob(self, path: Any, query: Any, body: bytes) -> p.BlobStatus:
        digest = path["digest"]
        data = self.stored[digest] = self.stored.get(digest, b"") + body
        whole = len(data) == int(query["size"])
        assert not whole or hashlib.sha256(data).hexdigest() == digest
        return p.BlobStatus(digest=digest, offset=len(data), complete=whole)

    def _add_event(self, event: Event) -> None:
        from dataclasses import replace

        self.events.append(replace(event, number=len(self.events) + 1, sent_at=time.time()))
        self._answer_polls()
        self._changed.notify_all()

    def _news(self, after: int) -> p.Poll | None:
        events = tuple(self.events[after:])
        if not events and self._cancel is None:
            return None
        return p.Poll(events=events, cursor=len(self.events), cancel=self._cancel, server_time=time.time() + self.ahead)

    def _answer_polls(self) -> None:
        held, self._held = self._held, []
        for number, after in held:
            poll = self._news(after)
            if poll is None:
                self._held.append((number, after))
            else:
                self._reply(number, 200, wire.dumps(poll))


class Executor:
    """A real executor in ``folder`` that speaks to ``hub``."""

    def __init__(self, folder: Path, hub: Hub, cache: Path, command: tuple[str, ...] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        launch = p.Launch(director="pipe", token="", experiment="trial", deployment=DEPLOYMENT, epoch=1)
        (folder / "launch.json").write_bytes(wire.dumps(launch))
        self.hub = hub
        self.folder = folder
        fd = hub.theirs.fileno()
        self.process = subprocess.Popen(
            [*(command or (sys.executable, "-P", "-m", "fieldlab_executor")), "run", str(folder), "--pipe", str(fd)],
            pass_fds=[fd],
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "FIELDLAB_CACHE": str(cache)},
        )
        hub.theirs.close()
        hub.start()

    def wait(self) -> int:
        _, said = self.process.communicate(timeout=SECONDS)
        sys.stderr.write(said.decode())
        return self.process.returncode

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


def process_of(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pids: list[int], seconds: float) -> list[int]:
    """The pids that are still alive after ``seconds`` at most; waits on the processes, not on a clock."""
    import select

    deadline = time.monotonic() + seconds
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        finally:
            os.close(fd)
    return [pid for pid in pids if process_of(pid)]


__all__ = ["CTX", "DEPLOYMENT", "ITEM", "Bench", "Executor", "Hub", "Reference", "gone", "value_of"]
