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
import contextlib
import errno
import faulthandler
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from typing import NoReturn

from fieldlab_executor import child, forkhooks, frames, processes

__all__ = ["main"]

_DEFAULT = (_signal.SIGCHLD, _signal.SIGTERM, _signal.SIGHUP)
_ATTEMPT = processes.ATTEMPT.encode()
RESERVE = 16 << 20  # bytes beyond a step's limit of memory, for what is to be said when it is reached
MAX_ORPHANS = 1000  # told in one packet; the others are told with the next
SWEEP = 30.0  # seconds; what is not dead then cannot be killed


class Spawner:
    """The spawner's state: its socket, and the children that it has forked and not reaped."""

    def __init__(self, control: socket.socket, root: str, inline: int, spared: bool) -> None:
        self._spared = spared
        self._control = control
        self._root = root
        self._inline = inline
        self._quiet = child.Quiet()
        self._known: set[int] = set()
        self._pid = os.getpid()
        self._children = f"/proc/self/task/{self._pid}/children"
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._waker, False)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # it ends when its supervisor does

    def run(self) -> None:
        """Serve until the supervisor is gone."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._wake:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake, 4096)
                    self._reap()
                elif not self._serve():
                    return

    def _serve(self) -> bool:
        try:
            packet = self._control.recv(64)
        except ConnectionError:
            return False
        if not packet:
            return False
        _, count = frames.FORK.unpack(packet)
        for _ in range(count):
            try:
                self._fork()
            except OSError as error:
                self._control.send(frames.FAILED.pack(b"F", error.errno or errno.EAGAIN))
        return True

    def _fork(self) -> None:
        ours, theirs = socket.socketpair()
        out, err = os.pipe(), os.pipe()
        try:
            pid = os.fork()
            if not pid:
                self._become_child(theirs, out[1], err[1], (ours.fileno(), out[0], err[0]))
            self._known.add(pid)
            socket.send_fds(self._control, [frames.CHILD.pack(b"C", pid)], [ours.fileno(), out[0], err[0]])
        finally:
            ours.close()
            theirs.close()
            for fd in (*out, *err):
                os.close(fd)

    def _become_child(self, theirs: socket.socket, out: int, err: int, others: tuple[int, ...]) -> NoReturn:
        try:
            # What `signal` puts around `_signal`, enumerations, is more memory to be copied than all the rest here.
            _signal.set_wakeup_fd(-1)
            for number in _DEFAULT:
                _signal.signal(number, _signal.SIG_DFL)
            _signal.signal(_signal.SIGINT, _signal.default_int_handler)
            os.setsid()
            self._bear_marks()
            os.dup2(out, 1)
            os.dup2(err, 2)
            for fd in (*others, out, err, self._wake, self._waker, self._control.detach()):
                os.close(fd)
            forkhooks.register()
            child.serve(theirs.detach(), self._root, self._inline, self._quiet)
        except BaseException:  # noqa: BLE001 - nothing of a child may ever run the spawner's own loop
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(70)

    def _bear_marks(self) -> None:
        pid = os.getpid()
        # As os.environ would, without the memory that its encoding and decoding touches.
        value = b"%d" % pid
        os.putenv(_ATTEMPT, value)
        os.environ._data[_ATTEMPT] = value  # type: ignore[attr-defined]
        _tell_kernel("/proc/self/comm", processes.mark(pid).encode())
        if self._spared:
            _tell_kernel("/proc/self/oom_score_adj", b"500")

    def _reap(self) -> None:
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._known.discard(pid)
            packet = frames.EXIT.pack(b"X", pid, status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
            orphans = self._orphans()
            self._control.send(packet + b"".join(map(frames.ORPHAN.pack, orphans)))

    def _orphans(self) -> list[int]:
        """Children that it did not fork: what processes of steps left behind."""
        fd = os.open(self._children, os.O_RDONLY)
        listed = os.read(fd, 65536)
        os.close(fd)
        return [pid for pid in map(int, listed.split()) if pid not in self._known][:MAX_ORPHANS]


def _tell_kernel(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, data)
    os.close(fd)


def _hold(memory: int) -> None:
    """Let neither this process nor any below it have more private memory than so many bytes."""
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    hard = memory + RESERVE if most == resource.RLIM_INFINITY else min(most, memory + RESERVE)
    resource.setrlimit(resource.RLIMIT_DATA, (min(memory, hard), hard))


def _prepare(fd: int) -> Spawner | None:
    """Wait for the first packet, which says where the deployment is; None if the supervisor left instead."""
    control = socket.socket(fileno=fd)
    packet = control.recv(1 << 20)
    if not packet:
        return None
    config = json.loads(packet)
    sys.path[0:0] = [*config["path"], config["site"]]
    for name in config["preload"]:
        with contextlib.suppress(Exception):  # it only looked like a module's name, or the step itself will say why
            importlib.import_module(name)
    if config["memory"] is not None:
        _hold(config["memory"])
    return Spawner(control, config["root"], config["inline"], config["spared"])


def main() -> None:
    """Run the spawner: ``argv`` has the descriptor of its socket, and the folder of its own modules."""
    fd, site = int(sys.argv[1]), sys.argv[2]
    sys.argv = [""]
    with contextlib.suppress(ValueError):
        sys.path.remove(site)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    with contextlib.suppress(ConnectionError):
        spawner = _prepare(fd)
        if spawner is not None:
            faulthandler.enable(2)  # its children have it, too: a crash leaves the user's traceback on standard error
            gc.collect()
            gc.freeze()
            gc.disable()
            spawner.run()
    processes.sweep(time.monotonic() + SWEEP)
