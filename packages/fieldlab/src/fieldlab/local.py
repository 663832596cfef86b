"""Run a DAG or an experiment here and now: ``fl.run``. The one module of the client that knows the executor.

Every deployment gets a real executor, a process of its own in the run's folder, with the same journal, children and
reports as on a node far away. It talks to this process over an inherited socket instead of HTTP: no director, no
service, no port. ``fieldlab.hub`` answers it; one thread here carries the frames.

On the socket, both ways, a frame is a JSON header and bytes (``fieldlab_executor.frames``). A request has the header
``{"id", "endpoint", "path", "query"}`` and the body as bytes; its answer ``{"id", "status"}`` and the body. Answers
may come in another order: a ``poll`` is held while there is nothing to say, and holds nothing else up.

Nothing outlives the call: an executor ends when its deployment does, when it is told to, or when the socket closes. One
that dies is followed by another that ships what it had journalled (``drain``), as the director has it done.

An experiment starts as it would with a director (``fieldlab_common.course``): when the environments of its deployments
are made, of as many as ``min_nodes`` says, and at ``start_at``. A deployment that is alone makes its own itself, so
that what its builder says stands in its log.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from fieldlab_common import protocol as p
from fieldlab_common import wire
from fieldlab_common.dag import DAG
from fieldlab_common.environment import Venv
from fieldlab_common.errors import (
    DefinitionError,
    FieldlabError,
    IllegalState,
    InvalidMessage,
    UnknownNameError,
    UnsupportedError,
)
from fieldlab_common.events import Event
from fieldlab_common.experiment import Experiment
from fieldlab_common.lifecycle import DeploymentState, Reason
from fieldlab_common.node import Node
from fieldlab_common.protocol import Lane

from fieldlab.here import this_node
from fieldlab.hub import Hub
from fieldlab.results import DeploymentResults
from fieldlab.runs import Run
from fieldlab.ship import PYTHON, Order, Shipment, pack, require_sound, step_names
from fieldlab.source import Source
from fieldlab.watch import watch as watch_run

__all__ = ["LocalSource", "run"]

_D = DeploymentState
STOP_SECONDS = 30.0  # for a cancelled executor to end what runs; then it is killed, and sweeps what is left
KILL_SECONDS = 5.0
DRAIN_SECONDS = 60.0  # to ship what a dead executor had journalled
SETTLE_SECONDS = 10.0  # for the executors of a run that has ended to leave by themselves


@overload
def run(
    what: DAG,
    *,
    node: Node | None = None,
    timeout: float | None = None,
    watch: bool = False,
    folder: str | os.PathLike[str] | None = None,
    secrets: Mapping[str, str] | None = None,
) -> DeploymentResults: ...
@overload
def run(
    what: Experiment,
    *,
    timeout: float | None = None,
    watch: bool = False,
    folder: str | os.PathLike[str] | None = None,
    wait: bool = True,
    secrets: Mapping[str, str] | None = None,
) -> Run: ...
def run(
    what: DAG | Experiment,
    *,
    node: Node | None = None,
    timeout: float | None = None,
    watch: bool = False,
    folder: str | os.PathLike[str] | None = None,
    wait: bool = True,
    secrets: Mapping[str, str] | None = None,
) -> DeploymentResults | Run:
    """Run ``what`` here and now, on this machine, and return when it has ended.

    A DAG gives the results of its one deployment (``fl.run(dag)["report"].value``); ``node`` has the facts that its
    steps are told, by default those of this machine. An experiment gives a ``Run``: each of its nodes is played by an
    executor here, with the facts that the node declares. With ``wait=False`` the run is returned while it goes on;
    close it in the end.

    ``timeout``: it is cancelled after so many seconds. ``watch``: show progress. ``folder``: where artifacts and
    journals are kept; by default a folder that is removed with the handle. ``secrets``: the texts of ``fl.secret`` by
    name. Ctrl-C cancels it and leaves nothing behind.

    Raises:
        PlanError: it cannot run as it is.
        UnknownNameError: a secret is missing.
        WaitTimeout: ``timeout`` passed.
        UnsupportedError: executors do not run on this platform.
    """
    if isinstance(what, DAG):
        experiment = Experiment(what.name).map(what, node or this_node())
    elif isinstance(what, Experiment):
        experiment = _played_here(what)
    else:
        raise DefinitionError(f"fl.run takes a DAG or an experiment, not {what!r:.80}.")
    shipment = require_sound(pack(experiment))
    _require_platform()
    _require_secrets(shipment, secrets or {})
    source = LocalSource(shipment.order(), folder, secrets)
    source.launch()
    handle = Run(source, source.info(), steps=step_names(shipment))
    if wait or isinstance(what, DAG):
        _finish(handle, source, timeout, watch)
    return handle if isinstance(what, Experiment) else next(iter(handle.results.values()))


def _require_secrets(shipment: Shipment, given: Mapping[str, str]) -> None:
    needed = {name for deployment in shipment.resolution.deployments for name in deployment.graph.secrets()}
    if missing := sorted(needed - set(given)):
        raise UnknownNameError(
            f"The secret {', '.join(map(repr, missing))} is needed and not given.",
            advice=f"Give fl.run(..., secrets={{{missing[0]!r}: ...}}).",
        )


def _played_here(experiment: Experiment) -> Experiment:
    """The same experiment, its nodes with the Python of this machine: that is what will run it.

    Which others the machine has is left open where one is asked for: its executor finds it, or says what there is.
    """
    made = Experiment(
        experiment.name,
        reporting=experiment.reporting,
        lost_after=experiment.lost_after,
        min_nodes=experiment.min_nodes,
        start_at=experiment.start_at,
        on_prepare_failure=experiment.on_prepare_failure,
    )
    for one in experiment.assignments:
        asks = isinstance(one.environment, Venv) and one.environment.python
        node = replace(one.node, python=() if asks else (PYTHON,))
        made.map(one.dag, node, role=one.role, env=one.environment, resources=one.resources, name=one.name)
    return made


def _require_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise UnsupportedError(
            f"Executors run on Linux so far, and this is {sys.platform}.",
            advice="Use WSL, a virtual machine or a container, or a director with Linux nodes; plan and simulate work.",
        )
    if importlib.util.find_spec("fieldlab_executor") is None:
        raise UnsupportedError(
            "fieldlab-executor is not installed.", advice="Install it: pip install fieldlab-executor."
        )


def _finish(handle: Run, source: LocalSource, timeout: float | None, watch: bool) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        if watch:
            watch_run(handle, handle.log_feed(), detach=False, until=deadline)
        handle.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        source.settle()
    except BaseException:  # Ctrl-C and a timeout alike: nothing may be left behind, then the caller is told
        handle.cancel("interrupted")
        handle.close()
        raise


# --- the run's source -------------------------------------------------------------------------------------------------


class LocalSource:
    """A run here, as ``Run`` reads it; owns the executors and the folder. ``options`` are the hub's."""

    def __init__(
        self,
        order: Order,
        folder: str | os.PathLike[str] | None = None,
        secrets: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self._folder = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="fieldlab-"))
        self._carrier = _Carrier()
        self._hub = Hub(order, self._folder / "blobs", woken=self._carrier.wake, secrets=secrets, **options)
        self._carrier.hub = self._hub
        self._order = order
        self._end = weakref.finalize(self, _end, self._carrier, self._folder if folder is None else None)

    def launch(self) -> None:
        """Prepare every deployment, and start them when the experiment may."""
        self._carrier.begin(self._order, self._folder / "deployments")

    def settle(self) -> None:
        """Wait until the executors of a run that has ended have sent their last logs and are gone."""
        self._carrier.join(SETTLE_SECONDS)

    def info(self) -> p.ExperimentInfo:
        return self._hub.info()

    def start(self) -> p.ExperimentInfo:
        self._hub.request_start()
        return self._hub.info()

    def rerun(self, start: bool) -> tuple[Source, p.ExperimentInfo]:
        raise UnsupportedError("A run here cannot be repeated by its handle.", advice="Call fl.run(...) once more.")

    def delete(self, force: bool) -> None:
        if force:
            self._hub.cancel("It was deleted.", ())
        elif not self._hub.info().state.terminal:
            raise IllegalState("The run has not ended.", advice="Delete it with force=True, which cancels it first.")
        self.close()

    def cancel(self, reason: str, deployments: Sequence[str]) -> p.ExperimentInfo:
        self._hub.cancel(reason, deployments)
        return self._hub.info()

    def records(self, lane: Lane, after: int, wait: float, deployment: str = "") -> p.RecordPage:
        return self._hub.records(lane, after, wait, deployment)

    def events(self, after: int, wait: float) -> p.EventPage:
        return self._hub.events(after, wait)

    def send(self, event: p.SendEvent) -> Event:
        return self._hub.send(event)

    def artifacts(self) -> tuple[p.ArtifactInfo, ...]:
        return self._hub.artifacts()

    def blob(self, digest: str, offset: int) -> Iterator[bytes]:
        return self._hub.blob(digest, offset)

    def close(self) -> None:
        """End what still runs, and remove the folder if it was made for this run."""
        self._end()


def _end(carrier: _Carrier, folder: Path | None) -> None:
    carrier.close()
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


# --- executors and their sockets --------------------------------------------------------------------------------------


@dataclass
class _Held:
    """A poll that waits for something to say."""

    id: int
    after: int
    query: dict[str, Any]
    deadline: float


@dataclass
class _Executor:
    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    socket: socket.socket
    unpacker: Any
    out: bytearray = field(default_factory=bytearray)
    held: list[_Held] = field(default_factory=list)
    killed_at: float | None = None  # when it is killed unless it has ended
    drains: str = ""  # it ships what one before it left, whose last words these are


class _Carrier:
    """The thread that carries frames between executors and the hub, and sees executors end."""

    hub: Hub

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        for end in (self._wake_in, self._wake_out):
            end.setblocking(False)
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._serve, name="fieldlab-local", daemon=True)
        self._experiment = ""
        self._lock = threading.Lock()  # held to see, or to say, that it is closing
        self._executors: dict[str, _Executor] = {}
        self._waiting: dict[str, Path] = {}  # the folders of deployments that are not launched
        self._preparations: set[Any] = set()
        self._closing = False

    # --- from other threads ---

    def wake(self) -> None:
        """Have the thread look again."""
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is woken already; closed: nobody is left to wake
            self._wake_out.send(b"w")

    def begin(self, order: Order, folder: Path) -> None:
        """Prepare the deployments of ``order``, and serve."""
        self._experiment = order.name
        specs = [spec for spec, _ in order.deployments]
        wanted: dict[str, list[p.DeploymentSpec]] = {}  # those that want the same environment
        for one in specs:
            self._waiting[one.name] = folder / one.name
            self.hub.move(one.name, _D.PREPARING)
            ready = one.environment.kind == "host" or len(specs) == 1
            wanted.setdefault("" if ready else f"{one.environment!r} {one.python}", []).append(one)
        self.hub.move_all([one.name for one in wanted.pop("", [])], _D.READY)
        for alike in wanted.values():
            threading.Thread(target=self._prepare, args=(alike,), name="fieldlab-prepare", daemon=True).start()
        self._thread.start()

    def _prepare(self, alike: list[p.DeploymentSpec]) -> None:
        """Make the environment of deployments that want the same."""
        from fieldlab_executor import environments, preparing

        names, first = [one.name for one in alike], alike[0]
        with self._lock:
            if self._closing:
                return
            environment = p.environment_of(first.environment)
            made = preparing.Preparation(_EXECUTOR, environment, first.python, lambda line: None)
            self._preparations.add(made)
        try:
            made.wait(environments.BUILD_SECONDS)
        except FieldlabError as error:
            self.hub.move_all(names, _D.FAILED, reason=Reason.PREPARE_FAILED, message=str(error))
        else:
            self.hub.move_all(names, _D.READY)
        finally:
            with self._lock:
                self._preparations.discard(made)
            self.wake()

    def join(self, timeout: float) -> None:
        """Wait until all executors are gone."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def close(self) -> None:
        """End every executor, at first with a request, and wait until all are gone."""
        with self._lock:
            self._closing = True
            for made in self._preparations:
                made.end()
        if self.hub.unfinished():
            self.hub.cancel("the run was closed", ())
        self.wake()
        self.join(STOP_SECONDS + 2 * KILL_SECONDS)

    # --- executors

    def _launch_ready(self) -> None:
        """Launch what may start now; forget what ended before it could."""
        for name in self.hub.launchable():
            folder = self._waiting.pop(name)
            if self.hub.move(name, _D.LAUNCHING).terminal:
                continue
            try:
                self._launch(name, folder)
            except OSError as error:
                self.hub.move(name, _D.FAILED, reason=Reason.LAUNCH_FAILED, message=str(error))
        unfinished = set(self.hub.unfinished())
        self._waiting = {name: folder for name, folder in self._waiting.items() if name in unfinished}

    def _launch(self, name: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        launch = p.Launch(director="pipe", token="", experiment=self._experiment, deployment=name, epoch=1)
        with open(os.open(folder / "launch.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(wire.dumps(launch))
        self._spawn("run", name, folder)

    def _spawn(self, word: str, name: str, folder: Path) -> _Executor:
        from fieldlab_executor.frames import Unpacker

        ours, theirs = socket.socketpair()
        with theirs, open(folder / "executor.log", "ab") as log:
            process = subprocess.Popen(
                [*_EXECUTOR, word, str(folder), "--pipe", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for this process, which then cancels in good order
            )
        ours.setblocking(False)
        executor = _Executor(name=name, folder=folder, process=process, socket=ours, unpacker=Unpacker())
        self._selector.register(ours, selectors.EVENT_READ, executor)
        self._executors[name] = executor
        return executor

    # --- the thread ---

    def _serve(self) -> None:
        try:
            while True:
                if self._waiting:
                    self._launch_ready()
                if not self._executors and not self._waiting:
                    return
                for key, mask in self._selector.select(self._patience()):
                    if key.data is None:
                        self._woken()
                    else:
                        self._move(key.data, mask)
                for executor in list(self._executors.values()):
                    self._answer_held(executor)
                    self._press(executor)
        finally:
            self._selector.close()

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass

    def _patience(self) -> float:
        """Until when nothing has to be done unless something comes."""
        now = time.monotonic()
        times = [held.deadline for one in self._executors.values() for held in one.held]
        times += [one.killed_at for one in self._executors.values() if one.killed_at is not None]
        if self._waiting:
            times.append(now + self.hub.until_start())
        return max(0.0, min([*times, now + 60.0]) - now)

    def _move(self, executor: _Executor, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            try:
                data = executor.socket.recv(1 << 20)
                requests = list(executor.unpacker.feed(data))
            except BlockingIOError:
                return
            except (OSError, InvalidMessage):
                data, requests = b"", []
            for header, body in requests:
                self._request(executor, header, body)
            if not data:
                self._gone(executor)
                return
        self._write(executor)

    def _request(self, executor: _Executor, header: dict[str, Any], body: bytes) -> None:
        if "recall" in header:
            executor.held = [held for held in executor.held if held.id != header["recall"]]
            return
        query = header.get("query") or {}
        number, endpoint = int(header["id"]), str(header["endpoint"])
        wait = float(query.get("wait") or 0.0)
        if endpoint == "poll" and wait > 0:
            after = int(query.get("after") or 0)
            executor.held.append(_Held(number, after, query, time.monotonic() + wait))
            return
        answered = self.hub.answer(executor.name, endpoint, header.get("path") or {}, query, body)
        self._reply(executor, number, answered.status, answered.body)

    def _answer_held(self, executor: _Executor) -> None:
        now = time.monotonic()
        for held in list(executor.held):
            if now >= held.deadline or self.hub.news(executor.name, held.after):
                executor.held.remove(held)
                answered = self.hub.answer(executor.name, "poll", {}, held.query, b"")
                self._reply(executor, held.id, answered.status, answered.body)
        self._write(executor)

    def _reply(self, executor: _Executor, number: int, status: int, body: bytes) -> None:
        from fieldlab_executor.frames import pack as pack_frame

        executor.out += pack_frame({"id": number, "status": status}, body)

    def _write(self, executor: _Executor) -> None:
        if executor.name not in self._executors:
            return
        try:
            while executor.out:
                sent = executor.socket.send(executor.out)
                del executor.out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            executor.out.clear()  # it is gone; reading will say so
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if executor.out else 0)
        if self._selector.get_key(executor.socket).events != wanted:
            self._selector.modify(executor.socket, wanted, executor)

    def _press(self, executor: _Executor) -> None:
        """Kill an executor whose time is over; while the run is being closed, that of each is limited."""
        now = time.monotonic()
        if executor.name not in self._executors:
            return
        if executor.killed_at is None:
            executor.killed_at = now + STOP_SECONDS if self._closing else None
        elif now >= executor.killed_at:
            executor.process.send_signal(signal.SIGKILL)
            executor.killed_at = now + KILL_SECONDS

    def _gone(self, executor: _Executor) -> None:
        """The socket has closed: the executor has ended, or is about to."""
        self._selector.unregister(executor.socket)
        executor.socket.close()
        try:
            code = executor.process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            executor.process.kill()
            code = executor.process.wait()
        del self._executors[executor.name]
        words = executor.drains or _last_words(code, executor.folder / "executor.log")
        if code not in _IN_ORDER and not executor.drains and not self._closing and self.hub.claimed(executor.name):
            with contextlib.suppress(OSError):
                drain = self._spawn("drain", executor.name, executor.folder)
                drain.drains, drain.killed_at = words, time.monotonic() + DRAIN_SECONDS
                return
        self.hub.executor_gone(executor.name, words)


_IN_ORDER = (0, 3)  # exit codes of an executor that leaves nothing: all is shipped, or the claim was another's
_EXECUTOR = (sys.executable, "-P", "-m", "fieldlab_executor")


def _environment() -> dict[str, str]:
    """The variables of this process, but those that say where its user's director is: that is no task's business."""
    return {k: v for k, v in os.environ.items() if k not in ("FIELDLAB_TOKEN", "FIELDLAB_ENDPOINT")}


def _last_words(code: int, log: Path) -> str:
    how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    try:
        lines = log.read_bytes()[-4096:].decode(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"The executor {how} without ending its deployment." + (f" It said: {lines[-1]}" if lines else "")
