"""Nodes on the director's own machine: for a first try, for tests, and for measurements of the machine itself.

Options: ``nodes`` is their number, or a list of ``{"name": …, "properties": {…}}``; ``prefix`` names numbered nodes
(``local-1`` …); ``properties`` are added to all; ``python`` is the interpreter of the executors; ``executable`` another
executor than the director's.

A deployment has a folder of its own; in it each epoch has ``<epoch>/`` (which is the executor's, see its command line),
``<epoch>.pid`` and ``<epoch>.log``. The executor is a process in a session of its own, so that it outlives this one. It
lives while the process that was started lives, or while somebody holds the lock in its folder; the lock is only tried
once the process is gone, because trying it could get in the way of an executor that starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fieldlab_common import wire
from fieldlab_common.errors import ConnectorError, InvalidMessage
from fieldlab_common.node import Node
from fieldlab_common.protocol import Tagged, environment_of
from fieldlab_common.step import check_name

from fieldlab_director.connectors.base import (
    Done,
    DrainRequest,
    Launched,
    LaunchRequest,
    Listed,
    Liveness,
    Nothing,
    Notice,
    Observation,
    Observations,
    ObserveRequest,
    Opening,
    Prepared,
    PrepareRequest,
    Stopped,
    Target,
)

__all__ = ["LocalConnector"]

MOST_NODES = 1000
STOP_GRACE = 10.0  # seconds from SIGTERM to SIGKILL
KILL_GRACE = 5.0  # seconds for the kernel to be done with it
BREAK_GRACE = 3.0  # seconds for a command that is broken off to end what it started
LEAVE_GRACE = 10.0  # seconds that an executor has to leave by itself, before what it left is removed
MOST_LOG = 1024 * 1024  # bytes of an executor's own log
TAIL = 2000  # bytes of its end that are shown
MOST_OUTPUT = 256 * 1024  # bytes kept of what a command says
AT_ONCE = 2  # environments that are made at a time: it is one machine
_OPTIONS = {"nodes", "prefix", "properties", "python", "executable"}
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PRIVATE = ("FIELDLAB_TOKEN", "FIELDLAB_ENDPOINT")  # the director's user's, and no business of an executor


@dataclass(frozen=True)
class _Place:
    """Where an epoch of a deployment is on disk."""

    root: Path
    epoch: int

    @property
    def folder(self) -> Path:
        return self.root / str(self.epoch)

    @property
    def pid(self) -> Path:
        return self.root / f"{self.epoch}.pid"

    @property
    def log(self) -> Path:
        return self.root / f"{self.epoch}.log"


@dataclass(frozen=True)
class _Said:
    """What came of a command: its exit code, its output, and what it said on standard error."""

    code: int
    output: str
    errors: str

    @property
    def tail(self) -> str:
        """The end of what it said, for people."""
        return self.errors.strip()[-TAIL:] or "It said nothing."


class LocalConnector:
    """The connector of kind ``local`` (see ``base.Connector``)."""

    observe_every: ClassVar[float] = 15.0 if hasattr(os, "pidfd_open") else 2.0

    def __init__(self, opening: Opening, notice: Notice) -> None:
        options = dict(opening.options)
        self._name = opening.infrastructure
        self._folder = Path(opening.folder)
        self._notice = notice
        self._wanted = _nodes(options)
        self._python = str(options.get("python") or sys.executable)
        self._executable = str(options.get("executable") or opening.executable)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._making = asyncio.Semaphore(AT_ONCE)
        self._watched: dict[Path, int] = {}  # folder of an epoch → descriptor of its process
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._draining: set[Path] = set()

    async def check(self, request: Nothing) -> Done:
        """Hold that the executor runs here."""
        if not await asyncio.to_thread(Path(self._executable).is_file):
            raise ConnectorError(
                f"There is no executor at {self._executable}.",
                advice="The director makes it when it starts; or give another one as executable=.",
                transient=False,
            )
        await self._facts()
        return Done()

    async def nodes(self, request: Nothing) -> Listed:
        """The nodes: what is known of this machine, and what each was given."""
        facts = await self._facts()
        return Listed(
            nodes=tuple(
                replace(facts, name=name, infrastructure=self._name, properties={**facts.properties, **properties})
                for name, properties in self._wanted
            )
        )

    async def prepare(self, request: PrepareRequest) -> Prepared:
        """A folder; and the environment, unless it is the machine as it is."""
        place = self._place(request.target)
        await asyncio.to_thread(_make_folder, place.root)
        if not _needs_work(request.environment):
            return Prepared(prepared={"python": self._python})
        environment = json.dumps(wire.encode(request.environment))
        async with self._making:
            python = ("--python", request.python) if request.python else ()
            said = await self._run("prepare", "--environment", environment, *python)
        return Prepared(prepared={"python": _prepared(said)})

    async def launch(self, request: LaunchRequest) -> Launched:
        """Start the executor, unless this epoch was started before."""
        place = self._place(request.target)
        async with self._locks[request.target.deployment]:
            if await asyncio.to_thread(self._liveness, place) is Liveness.ABSENT:
                await asyncio.to_thread(self._start, place, wire.dumps(request.launch))
            self._watch(request.target.deployment, place)
        return Launched(handle={"folder": str(place.folder)})

    async def observe(self, request: ObserveRequest) -> Observations:
        """Look at the processes and the locks."""
        places = [(target.deployment, self._place(target)) for target in request.targets]
        found = await asyncio.to_thread(lambda: [self._look(deployment, place) for deployment, place in places])
        for deployment, place in places:
            self._watch(deployment, place)
        return Observations(observations=tuple(found))

    async def stop(self, target: Target) -> Stopped:
        """SIGTERM, and SIGKILL after a grace."""
        place = self._place(target)
        async with self._locks[target.deployment]:
            await self._end(place, (signal.SIGTERM, STOP_GRACE), (signal.SIGKILL, KILL_GRACE))
        return Stopped(tail=await asyncio.to_thread(_tail, place.log))

    async def drain(self, request: DrainRequest) -> Done:
        """Let an executor ship what the journal of the dead one holds."""
        place = self._place(request.target)
        async with self._locks[request.target.deployment]:
            if not await asyncio.to_thread((place.folder / "journal").is_dir):
                return Done()
            await asyncio.to_thread(_write_private, place.folder / "launch.json", wire.dumps(request.launch))
            self._draining.add(place.folder)
            try:
                await self._command("drain", str(place.folder))
            finally:
                self._draining.discard(place.folder)
        return Done()

    async def clean_up(self, target: Target) -> Done:
        """Remove the deployment's folder. An executor that is about to leave gets the time to."""
        root = self._place(target).root
        async with self._locks[target.deployment]:
            for place in await asyncio.to_thread(_epochs, root):
                await self._end(place, (None, LEAVE_GRACE), (signal.SIGTERM, STOP_GRACE), (signal.SIGKILL, KILL_GRACE))
                self._unwatch(place.folder)
            await asyncio.to_thread(_remove, root)
        self._locks.pop(target.deployment, None)
        return Done()

    async def close(self) -> None:
        """Stop watching. Executors go on."""
        for folder in list(self._watched):
            self._unwatch(folder)

    # --- processes ---------------------------------------------------------------------------------------------------

    def _place(self, target: Target) -> _Place:
        if not _ID.fullmatch(target.deployment):
            raise ConnectorError(f"{target.deployment!r} cannot be the name of a folder.", transient=False)
        return _Place(self._folder / target.deployment, target.epoch)

    def _start(self, place: _Place, launch: bytes) -> None:
        _make_folder(place.folder)
        _write_private(place.folder / "launch.json", launch)
        with open(place.log, "ab", opener=_private) as log:
            process = subprocess.Popen(
                [self._python, self._executable, "run", str(place.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=place.folder,
                env=_environment(),
                start_new_session=True,
            )
        self._children[process.pid] = process
        _write_private(place.pid, json.dumps({"pid": process.pid, "start": _start_of(process.pid)}).encode())

    def _liveness(self, place: _Place) -> Liveness:
        if _running(place) is not None:
            return Liveness.ALIVE
        if place.folder in self._draining:
            return Liveness.DEAD
        if _locked(place.folder / "lock"):
            return Liveness.ALIVE
        started = place.pid.exists() or (place.folder / "journal").exists()
        return Liveness.DEAD if started else Liveness.ABSENT

    def _look(self, deployment: str, place: _Place) -> Observation:
        for process in list(self._children.values()):
            if process.poll() is not None:
                self._children.pop(process.pid, None)
        executor = self._liveness(place)
        _cut(place.log)
        tail = _tail(place.log) if executor is Liveness.DEAD else ""
        return Observation(deployment=deployment, executor=executor, tail=tail)

    def _watch(self, deployment: str, place: _Place) -> None:
        """Have the end of an executor told at once, where the kernel can; elsewhere the next look finds it."""
        if place.folder in self._watched or not hasattr(os, "pidfd_open"):
            return
        pid = _running(place)
        if pid is None:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._notice(deployment)
            return
        self._watched[place.folder] = descriptor
        asyncio.get_running_loop().add_reader(descriptor, self._gone, deployment, place, pid)

    def _gone(self, deployment: str, place: _Place, pid: int) -> None:
        self._unwatch(place.folder)
        process = self._children.pop(pid, None)
        if process is not None:
            process.poll()
        self._notice(deployment)

    def _unwatch(self, folder: Path) -> None:
        descriptor = self._watched.pop(folder, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    async def _end(self, place: _Place, *ways: tuple[signal.Signals | None, float]) -> None:
        """End the executor of an epoch: try ``ways`` (a signal, and seconds to wait) until one has helped."""
        for number, seconds in ways:
            pid = await asyncio.to_thread(_running, place)
            if pid is None:
                break
            if number is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if await self._wait(place, pid, seconds):
                return
        if await asyncio.to_thread(self._liveness, place) is Liveness.ALIVE:
            raise ConnectorError(f"The executor in {place.folder} could not be ended.")

    async def _wait(self, place: _Place, pid: int, seconds: float) -> bool:
        """Whether the process is gone within ``seconds``."""
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            if await asyncio.to_thread(_running, place) != pid:
                return True
            await _ended(pid, min(1.0, deadline - asyncio.get_running_loop().time()))
        return await asyncio.to_thread(_running, place) != pid

    async def _facts(self) -> Node:
        output = await self._command("facts")
        try:
            return wire.loads(Node, output.encode())
        except InvalidMessage as error:
            raise ConnectorError(
                f"{self._executable} facts said {output[:200]!r}, which is no node.", transient=False
            ) from error

    async def _command(self, *arguments: str) -> str:
        """What a command of the executor prints.

        Raises:
            ConnectorError: it ended with an error; its last lines are in it.
        """
        said = await self._run(*arguments)
        if said.code != 0:
            raise ConnectorError(f"The executor's {arguments[0]} ended with code {said.code}:\n{said.tail}")
        return said.output

    async def _run(self, *arguments: str) -> _Said:
        """Run a command of the executor to its end; one that is broken off is told to end, and then ended."""
        try:
            process = await asyncio.create_subprocess_exec(
                *(self._python, self._executable, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise ConnectorError(f"{self._python} cannot be started: {error}.", transient=False) from error
        assert process.stdout is not None  # PIPE was asked for
        assert process.stderr is not None
        try:
            output, errors = await asyncio.gather(_last(process.stdout), _last(process.stderr))
            code = await process.wait()
        finally:
            if process.returncode is None:
                await _break_off(process)
        return _Said(code, output, errors)


# --- options ---------------------------------------------------------------------------------------------------------


def _nodes(options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, properties) of each node that the options ask for."""
    unknown = sorted(set(options) - _OPTIONS)
    _hold(not unknown, f"has no option {', '.join(unknown)}; there are {', '.join(sorted(_OPTIONS))}")
    common = options.get("properties", {})
    _hold(isinstance(common, Mapping), "takes properties as an object")
    wanted = options.get("nodes", 1)
    if type(wanted) is int:
        _hold(1 <= wanted <= MOST_NODES, f"can have 1 to {MOST_NODES} nodes")
        prefix = str(options.get("prefix", "local"))
        found = [(f"{prefix}-{number}", dict(common)) for number in range(1, wanted + 1)]
    else:
        _hold(isinstance(wanted, list) and 1 <= len(wanted) <= MOST_NODES, "takes nodes as a number or a list")
        found = [_node(entry, common) for entry in wanted]
    for name, _ in found:
        check_name(name, "a node")
    _hold(len({name for name, _ in found}) == len(found), "was given two nodes of one name")
    return found


def _node(entry: Any, common: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    _hold(isinstance(entry, Mapping) and isinstance(entry.get("name"), str), "takes each node as an object with a name")
    properties = entry.get("properties", {})
    _hold(isinstance(properties, Mapping), "takes a node's properties as an object")
    return entry["name"], {**common, **properties}


def _hold(true: object, what: str) -> None:
    if not true:
        raise ConnectorError(f"A local infrastructure {what}.", transient=False)


def _needs_work(tagged: Tagged) -> bool:
    """Whether something must be made for this environment: not for the machine as it is, with nothing asked for."""
    environment = environment_of(tagged)
    wants = environment.requirements
    return bool(environment.kind != "host" or wants.packages or wants.system_packages or wants.setup)


def _prepared(said: _Said) -> str:
    """The interpreter that the executor's ``prepare`` answers with.

    Raises:
        ConnectorError: it answers that it could not make the environment, or nothing of use; its log is what was said.
    """
    try:
        answer = json.loads(said.output)
        if "python" in answer:
            return str(answer["python"])
        error = answer["error"]
        message, advice, transient = str(error["message"]), str(error["advice"]), bool(error["transient"])
    except (ValueError, KeyError, TypeError):
        message, advice, transient = f"The executor's prepare ended with code {said.code}:\n{said.tail}", "", True
    raise ConnectorError(message, advice=advice, transient=transient, log=said.errors)


# --- files and processes ---------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _PRIVATE}


def _make_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write_private(path: Path, data: bytes) -> None:
    """The whole file or none of it, for this user alone."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb", opener=_private) as file:
        file.write(data)
    part.replace(path)


def _start_of(pid: int) -> str:
    """When the process began, as the kernel counts; empty if it does not run (or this is not Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()  # proc(5): state, and field 22, starttime


def _running(place: _Place) -> int | None:
    """The executor's process, if it is the one that was started and still runs."""
    try:
        noted = json.loads(place.pid.read_bytes())
        pid, start = int(noted["pid"]), str(noted["start"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if start:
        return pid if _start_of(pid) == start else None
    if Path("/proc/self/stat").exists():
        return None  # it had ended before its beginning could be noted
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return None
    return pid


def _locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


async def _break_off(process: asyncio.subprocess.Process) -> None:
    """End a command and what it started: it is told to, so that it can find what got away from it, and then forced."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(BREAK_GRACE):
                await process.wait()
        os.killpg(process.pid, signal.SIGKILL)


async def _ended(pid: int, seconds: float) -> None:
    """Wait until a process ends, for at most ``seconds``; without the kernel's help, for a tenth of one."""
    if not hasattr(os, "pidfd_open"):
        await asyncio.sleep(min(0.1, seconds))
        return
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _epochs(root: Path) -> list[_Place]:
    names = {path.name.partition(".")[0] for path in root.iterdir()} if root.is_dir() else set()
    return [_Place(root, int(name)) for name in sorted(names) if name.isdigit()]


def _remove(root: Path) -> None:
    """Remove a folder, also where a task took away its own right to."""
    with contextlib.suppress(FileNotFoundError):
        for folder in _folders(root):
            folder.chmod(0o700)
        shutil.rmtree(root)


def _folders(root: Path) -> Iterator[Path]:
    yield root
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            os.chmod(entry.path, 0o700)
            yield from _folders(Path(entry.path))


def _cut(log: Path) -> None:
    """Keep an executor's log within its bound; it is written at its end, wherever that is."""
    try:
        if log.stat().st_size > MOST_LOG:
            kept = _tail(log, MOST_LOG // 4)
            with open(log, "r+b") as file:
                file.truncate(0)
            with open(log, "ab") as file:
                file.write(b"[the beginning was cut]\n" + kept.encode())
    except FileNotFoundError:
        return


def _tail(log: Path, most: int = TAIL) -> str:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return file.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


async def _last(stream: asyncio.StreamReader) -> str:
    """The last part of what a stream brings."""
    kept = b""
    while chunk := await stream.read(65536):
        kept = (kept + chunk)[-MOST_OUTPUT:]
    return kept.decode(errors="replace")
