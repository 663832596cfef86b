"""A large artifact, up from an executor and down to a user, beside nginx and scp.

Up is what an executor's link does with a file that its step declared: hash it, announce it, send it, until the director
has it on its disk and its SHA-256 is the announced one. Down is ``run.artifacts.download``: fetched, hashed, synced and
in its place. Beside them, in turns, on the same disk: a PUT to nginx (its DAV module) and a GET by curl, and scp by way
of an sshd on loopback. These neither hash nor sync; what a SHA-256 and a sync of as much cost is said beside.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import hashlib
import os
import queue
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import director as d
import fieldlab as fl
import programs
from fieldlab_common.lifecycle import DeploymentState, Reason
from fieldlab_common.protocol import ArtifactRecord, ClaimRequest, Ended, Lane, Launch
from fieldlab_executor.artifacts import Hashed, Hasher
from fieldlab_executor.journal import Journal
from fieldlab_executor.link import ArtifactFailed, ArtifactStored, Item, Link, LinkFailed
from fieldlab_executor.transport import HttpTransport
from measure import Row, Turns, Unavailable, Versions, run, timed, work

__all__ = ["artifacts"]

SIZE = 1024**3  # bytes
BLOCK = 1 << 20
LIMIT = 300.0  # seconds for one of them
START = 10.0  # seconds for a server to answer


def artifacts(rounds: int, versions: Versions) -> list[Row]:
    """Seconds for 1 GiB up and down, beside nginx and scp, and what it adds to the director's memory."""
    folder = work("artifacts")
    with contextlib.ExitStack() as stack:
        director = stack.enter_context(d.serving(folder / "director"))
        client = stack.enter_context(fl.Client(director.url, director.token))
        ours = stack.enter_context(_ours(client, folder, rounds))
        nginx, scp = _peer(stack, _nginx, folder), _peer(stack, _scp, folder)
        measures = {
            "up": ours.up,
            "PUT": lambda: nginx("up", ours.file),
            "scp up": lambda: scp("up", ours.file),
            "down": ours.down,
            "GET": lambda: nginx("down", ours.file),
            "scp down": lambda: scp("down", ours.file),
            "sha256": lambda: _sha256(ours.file),
            "sync": lambda: _written(folder / "synced"),
        }
        before = d.resident(director.pid)
        d.forget_peak(director.pid)
        turns = Turns.take(dict.fromkeys(measures, rounds), measures)
        grown = (d.resident(director.pid, "VmHWM") - before) / 1e6
    shutil.rmtree(folder)
    return _rows(turns, grown)


def _rows(turns: Turns, grown: float) -> list[Row]:
    found = turns.samples
    beside = f"SHA-256 of it {_median(found['sha256']):.2f} s, written and synced {_median(found['sync']):.2f} s"

    def row(way: str, ours: str, peer: str, theirs: str, aim: float) -> Row:
        note = "; ".join(filter(None, (beside, turns.note(ours, theirs))))
        name = f"1 GiB {way}"
        return Row(
            name=name,
            unit="s",
            samples=found[ours],
            peer=peer,
            peer_samples=found[theirs],
            aim=aim,
            aimed="ratio",
            note=note,
        )

    return [
        row("up", "up", "nginx, PUT", "PUT", 1.43),
        row("up", "up", "scp", "scp up", 1),
        row("down", "down", "nginx, GET", "GET", 1.43),
        row("down", "down", "scp", "scp down", 1),
        Row(name="director's memory, at most over before", unit="MB", samples=[grown], aim=32),
    ]


def _median(samples: list[float]) -> float:
    return statistics.median(samples) if samples else float("nan")


# --- ours -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ours(client: fl.Client, folder: Path, rounds: int) -> Iterator[_Ours]:
    """What goes up and down; a deployment for each round."""
    with d.simulated(client, rounds) as lab:
        described = fl.Experiment("artifacts").map(programs.one_step(), lab.nodes)
        sent = client.submit(described)

        async def launches() -> list[Launch]:
            return [await lab.launch() for _ in range(rounds)]

        yield _Ours(sent, asyncio.run(launches()), folder)


class _Ours:
    """``file`` goes up as an artifact of the next deployment, and comes down again."""

    def __init__(self, run: fl.Run, launches: list[Launch], folder: Path) -> None:
        self._run, self._launches, self._folder = run, launches, folder
        self.file = folder / "file"
        with self.file.open("wb") as file:
            for _ in range(SIZE // BLOCK):
                file.write(os.urandom(BLOCK))

    def up(self) -> float:
        """Seconds from the hash on until the director has it."""
        with self.file.open("r+b") as file:  # bytes that it does not have yet
            file.write(os.urandom(64))
        launch = self._launches.pop()
        journal = Journal(str(self._folder / f"journal-{launch.deployment}"))
        stored: queue.Queue[Item] = queue.Queue()
        link = Link(HttpTransport(launch.director, launch.token), journal, stored.put)
        try:
            link.claim(ClaimRequest(journal_id=journal.id, epoch=launch.epoch), timeout=d.WAIT)
            link.start()
            return timed(lambda: self._send(link, journal, stored))
        finally:
            journal.append(Lane.CONTROL, _ended())
            link.drain(d.WAIT)
            link.close()
            journal.close()

    def _send(self, link: Link, journal: Journal, items: queue.Queue[Item]) -> None:
        hashed: queue.Queue[Hashed] = queue.Queue()
        Hasher(_AtOnce(), hashed.put).add(Hashed({}, "file", str(self.file)))  # type: ignore[arg-type]
        file = hashed.get(timeout=LIMIT)
        assert file.digest is not None
        announced = ArtifactRecord(step="nothing", name="file", size=file.size, sha256=file.digest)
        number = journal.append(Lane.CONTROL, d.record("artifact", time.time(), announced))
        link.upload(file.digest, file.path, file.size, number)
        while not isinstance(item := items.get(timeout=LIMIT), ArtifactStored):
            if isinstance(item, ArtifactFailed | LinkFailed):
                raise RuntimeError(f"the artifact was not stored: {item}")

    def down(self) -> float:
        """Seconds until the newest artifact is in its place."""
        newest = self._run.artifacts.list()[-1]
        target = self._folder / "down"
        try:
            return timed(lambda: newest.download(target))
        finally:
            target.unlink()


class _AtOnce:
    """In place of the supervisor's loop: what is called is done."""

    def call(self, then: Callable[[], None]) -> None:
        """Do it."""
        then()


def _ended() -> bytes:
    return d.record("ended", time.time(), Ended(state=DeploymentState.SUCCEEDED, reason=Reason.COMPLETED))


# --- beside it --------------------------------------------------------------------------------------------------------


def _sha256(path: Path) -> float:
    with path.open("rb") as file:
        return timed(lambda: hashlib.file_digest(file, "sha256"))


def _written(path: Path) -> float:
    """Seconds to write as much, and to sync it."""
    block = os.urandom(BLOCK)

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(SIZE // BLOCK):
                file.write(block)
            os.fsync(file.fileno())

    try:
        return timed(write)
    finally:
        path.unlink()


Peer = Callable[[str, Path], float]


def _peer(
    stack: contextlib.ExitStack, make: Callable[[Path], contextlib.AbstractContextManager[Peer]], folder: Path
) -> Peer:
    """A peer that runs; or, where it cannot be had, one that says why whenever it is asked."""
    try:
        return stack.enter_context(make(folder))
    except Unavailable as error:
        why = str(error)

        def refuse(way: str, file: Path) -> float:
            raise Unavailable(why)

        return refuse


@contextlib.contextmanager
def _nginx(folder: Path) -> Iterator[Peer]:
    """nginx with one worker, that takes files and gives them with ``sendfile``; curl asks it."""
    port, place, curl = _free_port(), folder / "nginx", _program("curl")
    place.mkdir()
    temporary = "\n".join(f"{kind}_temp_path {place}/temporary-{kind};" for kind in ("client_body", *_GATEWAYS))
    (place / "nginx.conf").write_text(
        _NGINX.format(place=place, port=port, user=getpass.getuser(), temporary=temporary)
    )
    command = [_program("nginx"), "-c", place / "nginx.conf", "-e", place / "error.log", "-p", place]
    quiet = [curl, "--silent", "--show-error", "--fail", "--max-time", f"{LIMIT:g}"]
    url = f"http://127.0.0.1:{port}/file"
    ways = {"up": [*quiet, "--upload-file"], "down": [*quiet, url, "--output"]}

    def move(way: str, file: Path) -> float:
        arguments = [file, url] if way == "up" else [place / "down"]
        return timed(lambda: run([*ways[way], *arguments]))

    with _served(command, port):
        yield move


@contextlib.contextmanager
def _scp(folder: Path) -> Iterator[Peer]:
    """An sshd on loopback for this user alone, with keys of its own, and scp with the cipher that they agree on."""
    port, place, scp = _free_port(), folder / "ssh", _program("scp")
    place.mkdir(mode=0o700)
    for key in ("host", "user"):
        run([_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", place / key])
    (place / "config").write_text(_SSHD.format(place=place, port=port))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where Debian's sshd separates its privileges; its service makes it
    known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
    ask = [scp, "-q", "-P", str(port), "-i", place / "user", *known]
    there = f"{getpass.getuser()}@127.0.0.1:{place}/file"

    def move(way: str, file: Path) -> float:
        return timed(lambda: run([*ask, *((file, there) if way == "up" else (there, place / "down"))]))

    with _served([_program("sshd"), "-D", "-e", "-f", place / "config"], port):
        yield move


@contextlib.contextmanager
def _served(command: list[str | Path], port: int) -> Iterator[None]:
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            deadline = time.monotonic() + START
            while not _answers(port):
                if time.monotonic() > deadline or server.poll() is not None:
                    raise Unavailable(f"{Path(command[0]).name} did not start")
                time.sleep(0.05)
            yield
        finally:
            server.terminate()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found is None:
        raise Unavailable(f"{name} is not installed")
    return found


_GATEWAYS = ("proxy", "fastcgi", "uwsgi", "scgi")
_NGINX = """
daemon off;
master_process off;
pid {place}/pid;
user {user};
events {{ worker_connections 64; }}
http {{
    access_log off;
    sendfile on;
    {temporary}
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port};
        root {place};
        dav_methods PUT;
    }}
}}
"""
_SSHD = """
ListenAddress 127.0.0.1
Port {port}
HostKey {place}/host
AuthorizedKeysFile {place}/user.pub
PidFile none
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
Subsystem sftp internal-sftp
"""
