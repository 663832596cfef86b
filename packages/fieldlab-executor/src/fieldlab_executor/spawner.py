"""The small parent of all steps: forks children ahead of their jobs, reaps them, and sweeps when it is left alone.

It runs on the interpreter of the deployment's environment, has a single thread, never runs user code, and does what
the supervisor's packets say (``frames``): fork so many children. Each child gets a session, a socket and two output
pipes, whose other ends go to the supervisor; the spawner and the children forked later keep none of them, so that an
end of file is seen by whom it concerns. What is imported here before the first fork no child has to import.

Invariant: when the supervisor's end of the socket is closed, everything below this process is killed before it exits.
The spawner bears the mark of a subreaper from its start (``processes``), so that nothing below it can get away.

It is started by ``boot``, so that what it imports does not slow down every fork (``forkhooks``).
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import faulthandler
import gc
import os
import resource
import select
import sys
import time
from _signal import SIG_DFL, SIG_SETMASK, SIGCHLD, pthread_sigmask, set_wakeup_fd, signal
from os import O_WRONLY, WNOHANG, close, dup2, fork, getpid, pread, putenv, setsid, wait4, write
from os import open as open_file

from fieldlab_executor import ahead, child, forkhooks, frames, processes
from fieldlab_executor.child import serve
from fieldlab_executor.forkhooks import collected
from fieldlab_executor.given import Given

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["main"]

_KEPT_BACK = (_signal.SIGTERM, _signal.SIGINT, _signal.SIGHUP)  # it ends when its supervisor does
_ATTEMPT = processes.ATTEMPT.encode()
RESERVE = 16 << 20  # bytes beyond a step's limit of memory, for what is to be said when it is reached
_AGAIN = 11  # EAGAIN, of a fork that failed and does not say why
MAX_ORPHANS = 1000  # told in one packet; the others are told with the next
MAX_FIRST = 1 << 20  # bytes of the first packet
MAX_PACKET = 1 << 16  # and of each that follows: room is made for it each time, and for much that costs system calls
SWEEP = 30.0  # seconds; what is not dead then cannot be killed


def _heard(number: int, frame: object) -> None:
    """A child has ended: the byte in the pipe of wake-ups says it."""


class Spawner:
    """The spawner's state: its socket, and the children that it has forked and not reaped."""

    def __init__(self, control: _socket.socket, root: str, inline: int, spared: bool) -> None:
        self._spared = spared
        self._control = control
        self._given = Given(root, inline)
        self._quiet = child.Quiet()
        self._known: set[int] = set()
        self._variables: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
        self._children = os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY | os.O_CLOEXEC)
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        self._inherited = (self._wake, self._waker, self._children, control.fileno())
        set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal(SIGCHLD, _heard)
        pthread_sigmask(SIG_SETMASK, _KEPT_BACK)
        child.rehearse(root, inline, self._quiet)

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    os.read(self._wake, 4096)
                    self._reap()
                elif not self._serve():
                    return

    def _serve(self) -> bool:
        try:
            packet = self._control.recv(MAX_PACKET)
        except ConnectionError:
            return False
        if not packet:
            return False
        if packet[:1] == frames.LOAD:
            ahead.load(frames.told(packet[1:]))
            self._quiet.look()
            return True
        _, count = frames.FORK.unpack(packet)
        for _ in range(count):
            try:
                self._fork()
            except OSError as error:
                self._control.send(frames.FAILED.pack(b"F", error.errno or _AGAIN))
        return True

    def _fork(self) -> None:
        ours, theirs = _socket.socketpair()
        out, out_end = os.pipe()
        err, err_end = os.pipe()
        sock, sock_end = ours.detach(), theirs.detach()
        try:
            pid = fork()
            if not pid:
                others = (sock, out, err, out_end, err_end, *self._inherited)
                _become_child(
                    self._given, self._quiet, self._variables, self._spared, sock_end, out_end, err_end, others
                )
            self._known.add(pid)
            fds = frames.FDS.pack(sock, out, err)
            self._control.sendmsg([frames.CHILD.pack(b"C", pid)], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
        finally:
            for fd in (sock, sock_end, out, out_end, err, err_end):
                close(fd)

    def _reap(self) -> None:
        ended = []
        while True:
            try:
                pid, status, usage = wait4(-1, WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            self._known.discard(pid)
            ended.append(frames.EXIT.pack(b"X", pid, status, usage[0] + usage[1], usage[2]))
        if ended:
            orphans = b"".join(map(frames.ORPHAN.pack, self._orphans()))
            for packet in ended:
                self._control.send(packet + orphans)

    def _orphans(self) -> list[int]:
        """Children that it did not fork: what processes of steps left behind."""
        listed = pread(self._children, 65536, 0)
        return [pid for pid in map(int, listed.split()) if pid not in self._known][:MAX_ORPHANS]


def _become_child(
    given: Given,
    quiet: child.Quiet,
    variables: dict[bytes, bytes],
    spared: bool,
    sock: int,
    out: int,
    err: int,
    others: tuple[int, ...],
) -> NoReturn:
    """In the fork: a session, marks, descriptors; then wait for a job. Its arguments cost less than attributes do."""
    try:
        # What `signal` puts around `_signal`, enumerations, is more memory to be copied than all the rest here.
        set_wakeup_fd(-1)
        signal(SIGCHLD, SIG_DFL)
        pthread_sigmask(SIG_SETMASK, ())
        setsid()
        pid = getpid()
        mark = b"%d" % pid
        putenv(_ATTEMPT, mark)
        variables[_ATTEMPT] = mark  # as os.environ would, without its encoding and decoding
        comm = open_file("/proc/self/comm", O_WRONLY)
        write(comm, b"fl:" + mark)  # as processes.mark has it
        close(comm)
        if spared:
            _spare_others()
        dup2(out, 1)
        dup2(err, 2)
        for fd in others:
            close(fd)
        if collected:
            forkhooks.register()
        given.fd = sock
        serve(given, quiet, pid)
    except BaseException:  # noqa: BLE001 - nothing of a child may ever run the spawner's own loop
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(70)


def _spare_others() -> None:
    """Have the kernel end this process before the spawner when their group has no memory left."""
    fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
    os.write(fd, b"500")
    os.close(fd)


def _hold(memory: int) -> None:
    """Let neither this process nor any below it have more private memory than so many bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    hard = memory + RESERVE if most == resource.RLIM_INFINITY else min(most, memory + RESERVE)
    resource.setrlimit(resource.RLIMIT_DATA, (min(memory, hard), hard))


def _prepare(fd: int) -> Spawner | None:
    """Wait for the first packet, which says where the deployment is; None if the supervisor left instead."""
    control = _socket.socket(fileno=fd)
    packet = control.recv(MAX_FIRST)
    if not packet:
        return None
    config = frames.told(packet)
    sys.path[0:0] = [*config["path"], config["site"]]
    ahead.load(config["preload"])
    if config["memory"] is not None:
        _hold(config["memory"])
    return Spawner(control, config["root"], config["inline"], config["spared"])


def main() -> None:
    """Run the spawner: ``argv`` has the descriptor of its socket, and the folder of its own modules."""
    fd, site = int(sys.argv[1]), sys.argv[2]
    sys.argv = [""]
    if site in sys.path:
        sys.path.remove(site)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    try:
        spawner = _prepare(fd)
        if spawner is not None:
            faulthandler.enable(2)  # its children have it, too: a crash leaves the user's traceback on standard error
            gc.collect()
            gc.freeze()
            gc.disable()
            spawner.run()
    except ConnectionError:
        pass
    processes.sweep(time.monotonic() + SWEEP)
