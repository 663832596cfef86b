"""Keeps the executors of one node for who asks: prepares, starts, observes, stops, drains and cleans up.

``fieldlab.pyz keep`` answers the calls of ``fieldlab_common.keeping`` in frames on its standard input and output, for
as long as its input is open; what it started goes on without it, and the next keeper of the same folder finds it again.

A deployment has a folder of its own in the keeper's root; in it each epoch has ``<epoch>/`` (which is the executor's,
see its command line), ``<epoch>.pid`` and ``<epoch>.log``. The executor is a process in a session of its own. It lives
while the process that was started lives, or while somebody holds the lock in its folder; the lock is only tried once
the process is gone, because trying it could get in the way of an executor that starts. Two keepers of one root may be
at work at once (the line to the first was cut, and it has not noticed): they start an epoch once between them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldlab_common import wire
from fieldlab_common.calls import Answerer, Notice
from fieldlab_common.errors import ConnectorError, InvalidMessage
from fieldlab_common.keeping import (
    Checked,
    Done,
    DrainRequest,
    KeeperOpening,
    Launched,
    LaunchRequest,
    Listed,
    Liveness,
    Nothing,
    Observation,
    Observations,
    ObserveRequest,
    Prepared,
    PrepareRequest,
    Stopped,
    Target,
)
from fieldlab_common.messages import CheckLine, environment_of
from fieldlab_common.node import Node

from fieldlab_executor import checking
from fieldlab_executor.commands import Command, Said
from fieldlab_executor.starter import Starter, private, start_of, write_private

__all__ = ["Keeper", "Place", "cut", "furnish", "last_lines", "locked_file", "make_folder", "serve", "state_folder"]

STOP_GRACE = 10.0  # seconds from SIGTERM to SIGKILL
KILL_GRACE = 5.0  # seconds for the kernel to be done with it
LEAVE_GRACE = 10.0  # seconds that an executor has to leave by itself, before what it left is removed
MOST_LOG = 1024 * 1024  # bytes of an executor's own log
TAIL = 2000  # bytes of its end that are shown
AT_ONCE = 2  # environments that are made at a time: it is one machine
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def state_folder(environ: Mapping[str, str] | None = None) -> Path:
    """Where a node keeps what must survive a restart: ``fieldlab`` in ``$XDG_STATE_HOME``, else ``~/.local/state``."""
    environ = os.environ if environ is None else environ
    return Path(environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "fieldlab"


@dataclass(frozen=True)
class Place:
    """Where an epoch of a deployment is on disk: ``root`` is the deployment's folder."""

    root: Path
    epoch: int

    @property
    def folder(self) -> Path:
        """The executor's own."""
        return self.root / str(self.epoch)

    @property
    def pid(self) -> Path:
        """Which process it is."""
        return self.root / f"{self.epoch}.pid"

    @property
    def log(self) -> Path:
        """What it writes for people."""
        return self.root / f"{self.epoch}.log"


class Keeper:
    """The executors below one folder. ``command`` is the executor's command line that runs this."""

    observe_every = 15.0 if hasattr(os, "pidfd_open") else 2.0

    def __init__(self, opening: KeeperOpening, notice: Notice, command: list[str]) -> None:
        self._root = state_folder() / opening.root
        self._notice = notice
        self._executable = opening.executable
        own = [opening.python or sys.executable, opening.executable]
        self._command = Command(own if opening.executable else command)
        self._starter = Starter(self._command)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._making = asyncio.Semaphore(AT_ONCE)
        self._watched: dict[Path, int] = {}  # folder of an epoch → descriptor of its process
        self._draining: set[Path] = set()

    async def check(self, request: Nothing) -> Checked:
        """Try whether the executor runs here, and what else a deployment needs."""
        received = time.time()
        lines = (*await self._executor_lines(), *await asyncio.to_thread(checking.lines, self._root))
        return Checked(lines=lines, received=received, sent=time.time())

    async def nodes(self, request: Nothing) -> Listed:
        """This machine, as it sees itself."""
        return Listed(nodes=(await self._facts(),))

    async def prepare(self, request: PrepareRequest) -> Prepared:
        """A folder; and the environment, unless it is the machine as it is."""
        place = self._place(request.target)
        await asyncio.to_thread(make_folder, place.root)
        self._warm_up()
        if not _needs_work(request):
            return Prepared()
        environment = json.dumps(wire.encode(request.environment))
        async with self._making:
            python = ("--python", request.python) if request.python else ()
            said = await self._command.run("prepare", "--environment", environment, *python)
        return Prepared(prepared={"python": _prepared(said)})

    async def launch(self, request: LaunchRequest) -> Launched:
        """Start the executor, unless this epoch was started before."""
        place = self._place(request.target)
        async with self._locks[request.target.deployment]:
            await asyncio.to_thread(make_folder, place.root)
            with await asyncio.to_thread(locked_file, place.root / "launching"):
                if await asyncio.to_thread(self._liveness, place) is Liveness.ABSENT:
                    await asyncio.to_thread(furnish, place, wire.dumps(request.launch))
                    await self._starter.start(place.folder, place.log)
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
        return Stopped(tail=await asyncio.to_thread(last_lines, place.log))

    async def drain(self, request: DrainRequest) -> Done:
        """Let an executor ship what the journal of the dead one holds."""
        place = self._place(request.target)
        async with self._locks[request.target.deployment]:
            if not await asyncio.to_thread((place.folder / "journal").is_dir):
                return Done()
            await asyncio.to_thread(write_private, place.folder / "launch.json", wire.dumps(request.launch))
            self._draining.add(place.folder)
            try:
                await self._command.output("drain", str(place.folder))
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
        self._starter.close()

    def _warm_up(self) -> None:
        """An executor will be started soon."""
        self._starter.warm_up()

    # --- processes ---------------------------------------------------------------------------------------------------

    def _place(self, target: Target) -> Place:
        if not _ID.fullmatch(target.deployment):
            raise ConnectorError(f"{target.deployment!r} cannot be the name of a folder.", transient=False)
        return Place(self._root / target.deployment, target.epoch)

    def _liveness(self, place: Place) -> Liveness:
        if _running(place) is not None:
            return Liveness.ALIVE
        if place.folder in self._draining:
            return Liveness.DEAD
        if _is_locked(place.folder / "lock"):
            return Liveness.ALIVE
        started = place.pid.exists() or (place.folder / "journal").exists()
        return Liveness.DEAD if started else Liveness.ABSENT

    def _look(self, deployment: str, place: Place) -> Observation:
        executor = self._liveness(place)
        cut(place.log)
        tail = last_lines(place.log) if executor is Liveness.DEAD else ""
        return Observation(deployment=deployment, executor=executor, tail=tail)

    def _watch(self, deployment: str, place: Place) -> None:
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
        asyncio.get_running_loop().add_reader(descriptor, self._gone, deployment, place)

    def _gone(self, deployment: str, place: Place) -> None:
        self._unwatch(place.folder)
        self._starter.reap()
        self._notice(deployment)

    def _unwatch(self, folder: Path) -> None:
        descriptor = self._watched.pop(folder, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            os.close(descriptor)

    async def _end(self, place: Place, *ways: tuple[signal.Signals | None, float]) -> None:
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

    async def _wait(self, place: Place, pid: int, seconds: float) -> bool:
        """Whether the process is gone within ``seconds``."""
        deadline = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < deadline:
            if await asyncio.to_thread(_running, place) != pid:
                return True
            await _ended(pid, min(1.0, deadline - asyncio.get_running_loop().time()))
        return await asyncio.to_thread(_running, place) != pid

    async def _executor_lines(self) -> tuple[CheckLine, ...]:
        """Whether the executor runs, and the versions of Python that it finds."""
        said, advice = f"There is no executor at {self._executable}.", "Give another one as executable=."
        if not self._executable or await asyncio.to_thread(Path(self._executable).is_file):
            try:
                found = await self._facts()
                pythons = CheckLine(
                    what="Python", said=f"There is {', '.join(found.python) or sys.version.split()[0]}."
                )
                return CheckLine(what="executor", said="It runs."), pythons
            except ConnectorError as error:
                said, advice = error.message, error.advice
        return (CheckLine(what="executor", ok=False, said=said, advice=advice, needed=True),)

    async def _facts(self) -> Node:
        output = await self._command.output("facts")
        try:
            return wire.loads(Node, output.encode())
        except InvalidMessage as error:
            raise ConnectorError(f"The executor said {output[:200]!r}, which is no node.", transient=False) from error


async def serve(command: list[str]) -> None:
    """Answer on standard input and output until the input ends. ``command``: what runs the executor's command line."""
    # Standard output belongs to the frames: whatever else is printed goes where people read.
    frames = os.dup(1)
    os.set_inheritable(frames, False)
    os.dup2(2, 1)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, os.fdopen(frames, "wb", buffering=0))

    def make(body: Any, notice: Notice) -> Keeper:
        opening = wire.decode(KeeperOpening, body)
        if opening.slurm is None:
            return Keeper(opening, notice, command)
        from fieldlab_executor.slurm import SlurmKeeper  # which few nodes need

        return SlurmKeeper(opening, opening.slurm, notice, command)

    await Answerer("The keeper", make, transport.write).serve(lambda: reader.read(65536))


def _needs_work(request: PrepareRequest) -> bool:
    """Whether something must be made for this environment: not for the machine as it is, with nothing asked for."""
    environment = environment_of(request.environment)
    wants = environment.requirements
    return bool(environment.kind != "host" or wants.packages or wants.system_packages or wants.setup)


def _prepared(said: Said) -> str:
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


def make_folder(folder: Path) -> None:
    """Make a folder, and what it is in, for this user alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def furnish(place: Place, launch: bytes) -> None:
    """The folder of an epoch, with what its executor is launched with."""
    make_folder(place.folder)
    write_private(place.folder / "launch.json", launch)


def locked_file(path: Path) -> Any:
    """The file, locked by this process until it is closed; waits for another keeper that has it, which is brief."""
    file = open(path, "ab", opener=private)  # noqa: SIM115 - whoever asks closes it
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _running(place: Place) -> int | None:
    """The executor's process, if it is the one that was started and still runs."""
    try:
        noted = json.loads(place.pid.read_bytes())
        pid, start = int(noted["pid"]), str(noted["start"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if start:
        return pid if start_of(pid) == start else None
    if Path("/proc/self/stat").exists():
        return None  # it had ended before its beginning could be noted
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):
        return None
    return pid


def _is_locked(path: Path) -> bool:
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


def _epochs(root: Path) -> list[Place]:
    names = {path.name.partition(".")[0] for path in root.iterdir()} if root.is_dir() else set()
    return [Place(root, int(name)) for name in sorted(names) if name.isdigit()]


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


def cut(log: Path) -> None:
    """Keep an executor's log within its bound; it is written at its end, wherever that is."""
    try:
        if log.stat().st_size > MOST_LOG:
            kept = last_lines(log, MOST_LOG // 4)
            with open(log, "r+b") as file:
                file.truncate(0)
            with open(log, "ab") as file:
                file.write(b"[the beginning was cut]\n" + kept.encode())
    except FileNotFoundError:
        return


def last_lines(log: Path, most: int = TAIL) -> str:
    """The end of an executor's log, for people; nothing if there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - most))
            return file.read().decode(errors="replace").strip()
    except FileNotFoundError:
        return ""
