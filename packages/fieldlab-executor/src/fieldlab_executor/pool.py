"""The supervisor's side of the spawner: starts it, keeps children warm, hands them out, and hears of every exit.

The supervisor decides how many children are forked (``_WARM`` ahead of need, more while jobs wait), the spawner only
does it. A child is *warm* until it is taken; taking one costs nothing but the request for its successor.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from fieldlab_executor import boot, frames, processes
from fieldlab_executor.boot import BOOT
from fieldlab_executor.loop import Loop, Timer
from fieldlab_executor.room import Room, files, room

__all__ = ["Exit", "Job", "Pool", "Taker", "Takers", "Warm", "wait_for"]

_WARM = 2
_SOME, _MOST_AT_ONCE = 4, 16  # forks asked for and not yet done: fewer than some, and more are asked for, up to most
_RETRY = 0.2  # seconds until a fork that failed is tried again
_MAX_PACKET = 8192
_BESIDE = socket.CMSG_SPACE(frames.FDS.size)
_BIND_NOW = "LD_BIND_NOW"  # ld.so(8)

Taker = Callable[["Warm"], None]


class Job(Protocol):
    """What hears of a child that works for it."""

    def answered(self) -> None:
        """There is something to read on its socket."""

    def printed(self, fd: int) -> None:
        """There is something to read of its output."""


class Warm:
    """A child: its pid, its socket and the reading ends of its output, and the job that it works for, if it has one.

    Its descriptors are watched from its first job on, because most children have only one, and until it is closed.
    """

    __slots__ = ("_closed", "_loop", "_poll", "err", "job", "out", "pid", "sock")

    def __init__(self, loop: Loop, closed: Callable[[], None], pid: int, sock: int, out: int, err: int) -> None:
        self._loop, self._closed = loop, closed
        self.pid, self.sock, self.out, self.err = pid, sock, out, err
        self.job: Job | None = None
        self._poll = select.poll()
        for fd in (sock, out, err):
            os.set_blocking(fd, False)
            self._poll.register(fd, select.POLLIN)

    def begin(self, job: Job) -> None:
        """Let ``job`` hear of it."""
        self.job = job
        if not self._loop.watches(self.sock):
            self._loop.watch(self.sock, self._answered)
            self._loop.watch(self.out, lambda: self._printed(self.out))
            self._loop.watch(self.err, lambda: self._printed(self.err))

    def _answered(self) -> None:
        if self.job is not None:
            self.job.answered()
        else:  # an idle worker has nothing to say: it has died, or somebody speaks in its name
            self._loop.unwatch(self.sock)

    def _printed(self, fd: int) -> None:
        if self.job is not None:
            self.job.printed(fd)
        elif not _has_more(fd):
            self._loop.unwatch(fd)

    def news(self) -> list[int]:
        """Those of its descriptors that have something to read now, be it their end: to try each would cost more."""
        return [fd for fd, _ in self._poll.poll(0)]

    def close(self) -> None:
        """Give its descriptors back; the child sees the end of its socket and leaves."""
        self.job = None
        for fd in (self.sock, self.out, self.err):
            self._loop.forget(fd)
            os.close(fd)
        self._closed()


def _has_more(fd: int) -> bool:
    """Throw away what an idle worker prints, which belongs to no step; whether its end is still open."""
    try:
        return bool(os.read(fd, 65536))
    except BlockingIOError:
        return True
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended, in seconds and bytes; ``orphans`` are processes of steps that lost their parent."""

    pid: int
    status: int
    cpu: float
    peak: int
    orphans: tuple[int, ...] = ()

    @classmethod
    def of(cls, packet: bytes) -> Exit:
        """What the spawner says of a process that it reaped."""
        _, pid, status, cpu, peak = frames.EXIT.unpack_from(packet)
        orphans = tuple(orphan for (orphan,) in frames.ORPHAN.iter_unpack(packet[frames.EXIT.size :]))
        return cls(pid, status, cpu, peak * 1024, orphans)


class Takers(deque[Taker]):
    """Those who wait for a child, first come first served."""

    def forget(self, taker: Taker) -> bool:
        """Take one back that was not served yet; whether it was there."""
        try:
            self.remove(taker)
        except ValueError:
            return False
        return True


class Pool:
    """One spawner and its warm children, of which there are never more than ``room`` says.

    ``on_exit`` hears of every exit, ``on_lost`` that the spawner died, ``on_full`` that somebody waits for room.
    """

    def __init__(
        self,
        loop: Loop,
        on_exit: Callable[[Exit], None],
        on_lost: Callable[[], None],
        on_full: Callable[[Room], None],
    ) -> None:
        self._loop = loop
        self._on_exit = on_exit
        self._on_lost = on_lost
        self._on_full = on_full
        self._files = files()
        self.room = room()
        self._open = 0  # children whose descriptors are open here
        self._retry: Timer | None = None
        self._warm: deque[Warm] = deque()
        self.takers = Takers()
        self._asked = 0
        self._more = 0
        self._control: socket.socket | None = None
        self.pid = 0

    def start(self, python: Sequence[str], site: str, env: Mapping[str, str]) -> None:
        """Start the spawner on an interpreter: the command line ``python``, with its modules in ``site``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.set_inheritable(theirs.fileno(), True)
        command = [*python, "-P", "-c", BOOT, str(theirs.fileno()), site]
        pid = os.fork()
        if not pid:
            resource.setrlimit(resource.RLIMIT_NOFILE, self._files)
            _become(command, env)
        theirs.close()
        ours.setblocking(False)
        self.pid, self._control, self._asked = pid, ours, 0
        self._loop.watch(ours.fileno(), self._readable)

    def configure(self, config: dict[str, Any]) -> None:
        """Tell the spawner where the deployment is; the first children are forked then."""
        self._send(frames.tell(config))
        self._ask()

    def preload(self, names: list[str]) -> None:
        """Have the children that are forked from now on find these modules imported."""
        if names:
            self._send(frames.LOAD + frames.tell(names))

    def take(self, taker: Taker) -> None:
        """Give ``taker`` a child, now or as soon as there is one."""
        if self._warm and not self.takers:
            taker(self._warm.popleft())
        else:
            self.takers.append(taker)
        self._ask()

    def close(self) -> None:
        """Close the spawner's socket: it kills everything below itself and exits."""
        if self._control is not None:
            self._loop.forget(self._control.fileno())
            self._control.close()
            self._control = None
        while self._warm:
            self._warm.popleft().close()

    def _ask(self) -> None:
        """Have children forked, several at a time: what the first has the spawner copy, the next finds copied."""
        short = _WARM + len(self.takers) - len(self._warm) - self._asked
        if short <= 0 or self._asked >= _SOME or self._control is None or self._retry is not None:
            return
        space = self.room.most - self._open - self._asked
        if space < short and self.takers and not self._warm:
            self._on_full(self.room)
        wanted = min(short + self._more, _MOST_AT_ONCE - self._asked, space)
        if wanted > 0:
            self._asked += wanted
            self._more = 1  # from now on; an executor that has nothing to do keeps no more than it may need
            self._send(frames.FORK.pack(b"F", wanted))

    def _freed(self) -> None:
        """A child's descriptors were given back."""
        self._open -= 1
        if self.takers:
            self._ask()

    def _try_again(self) -> None:
        self._retry = None
        self._ask()

    def _send(self, packet: bytes) -> None:
        if self._control is not None:
            with contextlib.suppress(ConnectionError):  # the end of the socket will be read next
                self._control.send(packet)

    def _readable(self) -> None:
        control = self._control
        while control is not None and control is self._control:
            try:
                packet, beside, _, _ = control.recvmsg(_MAX_PACKET, _BESIDE)
            except BlockingIOError:
                return
            except ConnectionError:
                packet, beside = b"", []
            if not packet:
                self.close()
                self._on_lost()
                return
            self._heard(packet, beside[0][2] if beside else b"")

    def _heard(self, packet: bytes, fds: bytes) -> None:
        kind = packet[:1]
        if kind == b"X":
            self._on_exit(Exit.of(packet))
        elif kind == b"C":
            self._asked -= 1
            self._open += 1
            self._serve(Warm(self._loop, self._freed, frames.CHILD.unpack(packet)[1], *frames.FDS.unpack(fds)))
            self._ask()
        else:  # a fork failed: there may be room again when something has ended
            self._asked -= 1
            self._retry = self._retry or self._loop.after(_RETRY, self._try_again)

    def _serve(self, child: Warm) -> None:
        if self.takers:
            self.takers.popleft()(child)
        else:
            self._warm.append(child)


def _become(command: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """After a fork: become the spawner, in a session of its own, reading nothing."""
    try:
        os.setsid()
        processes.become_subreaper()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        # Every child would look up again what a library calls for the first time in it.
        early = {} if _BIND_NOW in env else {_BIND_NOW: "1", boot.ASKED: _BIND_NOW}
        os.execve(command[0], list(command), {**env, **early})
    finally:
        os._exit(71)


def wait_for(pid: int, seconds: float) -> bool:
    """Wait until the child ``pid`` has ended, and reap it; False if it has not within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if os.waitpid(pid, os.WNOHANG)[0]:
                return True
        except ChildProcessError:
            return True
        if time.monotonic() >= deadline:
            return False
        processes.await_any([pid], deadline)
